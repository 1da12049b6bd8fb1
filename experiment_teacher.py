"""A teacher's config, as the student's run reads it: a model of its own, on the student's data.

`config.distill.teacher` is a run's workdir or a folder of Hugging Face. What the model is comes
from there; data, mesh and layout are the student's: both compute on one batch, side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from config_border import complete, has_config, is_run, read_config
from config_sources import refuse_adapters, with_checkpoint
from config_types import plain
from configs import base

if TYPE_CHECKING:
    from experiment import Experiment

OF_STUDENT = ("data", "loss", "mesh")
OF_NONE = (  # as in configs/base.py
    *("checkpoint", "distill", "eval", "optimizer", "pipeline", "remat", "train"),
)
KEY = "config.distill.teacher"


def own_config(config: ConfigDict) -> ConfigDict:
    """The config of the teacher's folder alone; of Hugging Face's its objective is the student's.

    Raises:
      ValueError: no such folder, or neither a run nor a checkpoint that is read here.
    """
    folder = Path(config.distill.teacher)
    if not folder.is_dir():
        raise ValueError(
            f"{KEY} = '{folder}': no such folder; give a workdir of train.py, or a folder with "
            f"config.json and model.safetensors"
        )
    if not is_run(folder):
        start = complete({"objective": plain(config.objective)})
        return with_checkpoint(start, folder, KEY, ())
    if not has_config(folder):
        raise ValueError(
            f"{KEY} = '{folder}': it has checkpoints/ and no config.json; give a folder that "
            f"train.py wrote"
        )
    own = read_config(folder)
    refuse_adapters(own, folder, KEY)
    return own


def teacher_config(config: ConfigDict) -> ConfigDict:
    """What `read_experiment` builds the teacher of.

    It has no gradient, so that levels 1 and 2 of ZeRO mean nothing for it: where the student's
    state is divided over fsdp so is the teacher, and gathered where it is used, as at level 3.

    Raises:
      ValueError: of `own_config`, or a teacher of something else than the student is trained for.
    """
    own, student = own_config(config), plain(config)
    name, here = own.objective.name, config.objective.name
    if name != here:
        raise ValueError(
            f"{KEY} = '{config.distill.teacher}': it was trained for {name}, and "
            f"config.objective.name = {here!r}; choose a teacher that predicts the same tokens"
        )
    if here == "classification":
        raise ValueError(
            f"{KEY} = '{config.distill.teacher}': config.objective.name = 'classification' "
            f"predicts no tokens, whose distributions are taught; leave it empty"
        )
    compute = config.distill.teacher_compute or config.precision.compute
    compute = "float32" if compute == "float16" else compute
    values: dict[str, Any] = plain(own) | {name: student[name] for name in OF_STUDENT}
    values |= {name: plain(base.get_config())[name] for name in OF_NONE}
    values["parallel"] = student["parallel"] | {"zero": 3 if config.parallel.zero else 0}
    values["precision"] = {"params": compute, "compute": compute}
    return complete(values | {"layout": "given"})


def check_teacher(student: Experiment, teacher: Experiment) -> None:
    """Refuses a teacher whose tokens, images or layers are not those that the student needs.

    Raises:
      ValueError: naming the key and both values.
    """
    where = f"{KEY} = '{student.distill.teacher}'"
    if student.mesh.pipe > 1:
        raise ValueError(
            f"{where}: not built for config.mesh.pipe = {student.mesh.pipe}; set it to 1, and "
            f"config.mesh.fsdp or tensor higher"
        )
    if teacher.model.vocab_size != student.model.vocab_size:
        raise ValueError(
            f"{where}: its vocabulary has {teacher.model.vocab_size} tokens, and "
            f"config.model.vocab_size = {student.model.vocab_size}; both predict the same tokens"
        )
    if student.distill.teacher_step and not is_run(student.distill.teacher):
        raise ValueError(
            f"config.distill.teacher_step = {student.distill.teacher_step}: {where} has no steps; "
            f"set it to 0"
        )
    for name in ("image_size", "patch_size", "channels"):
        theirs, ours = (getattr(one.model.vision, name) for one in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"{where}: its config.vision.{name} is {theirs}, and here it is {ours}; both read "
                f"the same patches"
            )
    student.distill.pairs(student.model.layers, teacher.model.layers)
