"""Checkpoints: asynchronous, atomic, checked, and ignorant of the layout that wrote them.

A step on disk is a folder `<directory>/<step>/`:

    state/          an Orbax checkpoint of nested dicts, named by the paths of the state's tree
    metadata.json   what the caller passed: resolved config, data position, metrics
    manifest.json   all tensors and files, with sizes and checksums (training/manifest.py)

It is written as `<step>.tmp` and renamed when complete, so a folder with a bare number is a whole
step, unless something happened to it later; the manifest tells. A damaged step is set aside as
`<step>.damaged` for its owner to look at; it is never counted, and never deleted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from training import manifest, naming, orbax_io

log = logging.getLogger(__name__)
PyTree = Any


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep (`config.checkpoint`).

    Attributes:
      every: steps between two saves.
      keep: how many of the newest steps stay on disk.
      best: a metric, lower is better; the step with the lowest stays too. Empty: none does.
    """

    every: int = 1000
    keep: int = 3
    best: str = ""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"config.checkpoint.{name} = {value}: at least 1 is right")


class Checkpoints:
    """The checkpoints of one run.

    Every process calls every method, in the same order; they share `directory`.

    Args:
      directory: where the steps are; made if it is missing.
      config: None opens them for reading: nothing is cleaned, set aside or made.

    Attributes:
      seconds_blocked: how long `save` has kept its callers, in all.

    Raises:
      ValueError: the directory cannot be made.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig | None = None) -> None:
        self._directory = Path(directory).absolute()
        self._config = config
        self._attempt = 0
        self._attempts = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.seconds_blocked = 0.0
        if config is not None and jax.process_index() == 0:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"--workdir: {self._directory} cannot be made ({error.strerror}); choose a "
                    f"directory that you may write to"
                ) from error
            for path in self._remove_unfinished():
                log.warning("%s was interrupted while being written and is removed", path)

    def steps(self) -> list[int]:
        """The steps on disk, oldest first. Only `restore` knows whether they are undamaged."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The newest of `steps`, None if there is none."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was passed to `save` beside the state."""
        return json.loads((self._directory / str(step) / "metadata.json").read_text("utf-8"))

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Copies the state to the host and returns; the rest happens beside the training.

        A step that is on disk already is left as it is. A save that fails is reported as a
        warning and leaves the earlier steps alone; training goes on to the next one.

        Args:
          step: the number of steps that the state has seen.
          state: a tree of jax.Arrays, typed random keys included. May be donated after the return.
          metadata: JSON; `metadata["metrics"]` holds the metric that `config.best` names.
        """
        assert self._config is not None, "opened for reading"
        start = time.perf_counter()
        self._settle()
        self._remove_unfinished()
        if not self._agree(int((self._directory / str(step)).exists())):
            leaves = naming.named(state)
            tensors = {name: naming.describe(leaf) for name, leaf in leaves.items()}
            tree = naming.nested({name: naming.to_data(leaf) for name, leaf in leaves.items()})
            text = json.dumps(dict(metadata), indent=1)
            staging = self._directory / f"{step}.tmp"
            self._attempts += 1
            writer = orbax_io.make_checkpointer(self._attempts)
            try:
                orbax_io.save(writer, staging / "state", tree)
            except (OSError, ValueError) as error:
                self._pending = Future()
                self._pending.set_exception(self._report(step, error))
            else:
                self._pending = self._pool.submit(self._finish, writer, step, tensors, text)
        self.seconds_blocked += time.perf_counter() - start

    def tensors(self, step: int | None) -> tuple[int, dict[str, dict[str, Any]]]:
        """The step that `restore` would read, and what `naming.describe` said of its tensors.

        Raises:
          ValueError: there is no such step, or it is damaged.
        """
        found = self._find(step)
        return found, manifest.tensors(self._directory / str(found))

    def fingerprint(self, step: int) -> str:
        """Of what is in a step's arrays, by the checksums of their files."""
        return manifest.fingerprint(self._directory / str(step))

    def restore(
        self,
        step: int | None,
        abstract_state: PyTree,
        partial: bool = False,
        left: Collection[str] = (),
    ) -> tuple[int, PyTree]:
        """Reads a step onto any mesh, in any precision, with any number of processes.

        Args:
          step: None is the newest that is undamaged; each damaged one is named in a warning.
          abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings; values are cast.
          partial: `abstract_state` is a part of what was saved, such as the parameters alone.
          left: with `partial`, names of tensors that are left out.

        Returns:
          The step, and the state in the structure of `abstract_state`.

        Raises:
          ValueError: there is no such step, it is damaged, or it holds another model.
        """
        found, saved = self.tensors(step)
        path, wanted = self._directory / str(found), naming.named(abstract_state)
        kept = {name: tensor for name, tensor in saved.items() if name not in left}
        naming.compare(wanted, kept, path, partial)
        abstract = naming.nested({n: naming.abstract_data(leaf) for n, leaf in wanted.items()})
        read = orbax_io.restore(path / "state", abstract, partial)
        arrays = naming.named(read)
        leaves = [naming.from_data(arrays[n], leaf, saved[n]) for n, leaf in wanted.items()]
        return found, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _find(self, step: int | None) -> int:
        """The step asked for, or the newest, if it is there undamaged."""
        self._settle()
        found = self._agree(self._undamaged(step) if jax.process_index() == 0 else 0)
        if found >= 0:
            return found
        where = f"--workdir: {self._directory} has no"
        if step is None:
            raise ValueError(f"{where} undamaged checkpoint; train first, or choose another")
        others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
        raise ValueError(f"{where} undamaged step {step}; other steps there: {others}")

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          ValueError: it failed; the message says why, and how much space is free.
        """
        error = self._settle()
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._config is not None:
                self._remove_unfinished()

    def _settle(self) -> BaseException | None:
        """Waits for the save that is under way; returns its error, which was reported already."""
        pending, self._pending = self._pending, None
        return pending.exception() if pending is not None else None

    def _finish(
        self,
        writer: ocp.AsyncCheckpointer,
        step: int,
        tensors: dict[str, dict[str, Any]],
        metadata: str,
    ) -> None:
        """In the background: waits for Orbax on all processes, then makes the step count."""
        staging = self._directory / f"{step}.tmp"
        try:
            writer.close()
            if jax.process_index() == 0:
                # The mesh that wrote it. Nobody needs it: whoever restores brings a sharding.
                (staging / "state" / "_sharding").unlink(missing_ok=True)
                (staging / "metadata.json").write_text(metadata, encoding="utf-8")
                manifest.write(staging, tensors)
                staging.rename(self._directory / str(step))
                self._prune()
        except Exception as error:
            raise self._report(step, error) from error

    def _report(self, step: int, error: Exception) -> ValueError:
        """Removes what a failed save left (a full disk needs the room) and says what happened."""
        self._remove_unfinished()
        free = shutil.disk_usage(self._directory).free / 2**30
        reason = _one_line(error)
        message = (
            f"--workdir: step {step} could not be saved in {self._directory}, where {free:.2f} "
            f"GiB are free; make room or choose another disk. Steps kept: {self.steps()}. "
            f"Reason: {reason}"
        )
        log.warning(message)
        return ValueError(message)

    def _remove_unfinished(self) -> list[Path]:
        """Removes folders of saves that did not end well, and names them; nothing is being saved.

        After a failure Orbax's other threads may still add files to theirs: what comes too late to
        be removed here is removed before the next save.
        """
        found = list(self._directory.glob("*.tmp")) if jax.process_index() == 0 else []
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return found

    def _prune(self) -> None:
        """Deletes all but the newest `keep` steps and the best one."""
        assert self._config is not None
        steps = self.steps()
        kept = set(steps[-self._config.keep :])
        if self._config.best:
            values = {step: self._metric(step) for step in steps}
            kept.add(min(reversed(steps), key=lambda step: values[step]))
        for step in steps:
            if step not in kept:
                # Renamed first: a deletion that is interrupted must not look like a damaged step.
                doomed = (self._directory / str(step)).rename(self._directory / f"{step}.tmp")
                shutil.rmtree(doomed, ignore_errors=True)

    def _metric(self, step: int) -> float:
        """The metric `config.best` of a step; infinite where it has none or is not a number."""
        assert self._config is not None
        try:
            value = float(self.metadata(step)["metrics"][self._config.best])
        except (OSError, ValueError, KeyError, TypeError):
            return np.inf
        return value if np.isfinite(value) else np.inf

    def _undamaged(self, step: int | None) -> int:
        """The step asked for, or the newest, that nothing is wrong with; -1 if there is none."""
        damaged: list[int] = []
        for candidate in reversed(self.steps()):
            if step not in (None, candidate):
                continue
            damage = manifest.damage(self._directory / str(candidate))
            if damage is None:
                if self._config is not None:
                    for other in damaged:
                        self._set_aside(other)
                return candidate
            log.warning("step %d in %s is damaged: %s", candidate, self._directory, damage)
            damaged.append(candidate)
        return -1  # All stay where they are, lest the next start takes the run for a new one.

    def _set_aside(self, step: int) -> None:
        """Renames a damaged step: its number is free, and its owner can look at it."""
        path = self._directory / str(step)
        aside = path.with_name(f"{step}.damaged")
        while aside.exists():
            aside = aside.with_name(aside.name + "_")
        path.rename(aside)
        log.warning("step %d is set aside as %s; an older one is restored", step, aside)

    def _agree(self, value: int) -> int:
        """The value that process 0 has."""
        if jax.process_count() == 1:
            return value
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _one_line(error: Exception, length: int = 200) -> str:
    """The end of a message: storage libraries begin with paths and say last what happened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"... {text[-length:]}"
