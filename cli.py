"""The border between a command line and typed code: flags in, a config out, one line for an error.

`run` is all that a command line calls. JAX is imported only once every flag was found good, so that
a typo costs a quarter of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from config_border import keys_named
from config_sources import Source, config_of

USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Flag:
    """One more `--name` of a command line; passed to its main under that name.

    One of type bool takes no value: it is False unless given.
    """

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: Sequence[Any] | None = None
    several: bool = False  # may be given more than once, and makes a list
    required: bool = False


def run(
    main: Callable[..., None],
    *,
    name: str,
    about: str | None,
    config_from: Source,
    flags: Sequence[Flag] = (),
    argv: Sequence[str] | None = None,
    needs_workdir: bool = True,
) -> NoReturn:
    """Reads the command line, starts the processes, calls `main(config, workdir, **flags)`, exits.

    Exit codes: 0; 2 with one line `error: ...` for a ValueError or OSError, which are taken to be
    the user's (wrong key, missing file); 1 with one line for anything else; 130 on Ctrl-C. With
    `--debug` the stack trace comes first.

    Args:
      main: the program; its keyword arguments are named as the flags are.
      name: the command, such as `train.py`.
      about: the text of `--help`.
      config_from: "file" for `--config=FILE`, or where that is absent the workdir's own config (a
        run that is continued); "workdir" for the workdir's config alone; "workdir or checkpoint"
        for that or, with `--hf=DIR`, a checkpoint's model in a config file. `--config.KEY=VALUE`
        overrides each.
      flags: more flags.
      argv: the arguments, if not those of the process.
      needs_workdir: False for a program that is no run: it takes no `--workdir`, joins no other
        processes, uses no devices, and is called as `main(config, **flags)`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        _silence(debug)
        hide_cuda()
        options, config = parse(name, about, config_from, flags, arguments, needs_workdir)
        given = {flag.name: getattr(options, flag.name) for flag in flags}
        if needs_workdir:
            from parallel.distributed import start  # imports jax: only after all flags were checked

            start(options.coordinator, options.num_processes, options.process_id)
            given["workdir"] = options.workdir
            given |= {"hf": options.hf} if hasattr(options, "hf") else {}
        main(config, **given)
        code = 0
    except KeyboardInterrupt:
        code = _report(
            "interrupted; the same command continues from the last checkpoint", INTERRUPTED
        )
    except (ValueError, OSError) as error:
        code = _report(f"error: {_one_line(error)}", USER_ERROR, debug)
    except Exception as error:
        line = f"error: (internal) {type(error).__name__}: {_one_line(error)}"
        end = "" if debug else "; run again with --debug for the stack"
        code = _report(line + end, INTERNAL_ERROR, debug)
    _leave(code)


def parse(
    name: str,
    about: str | None,
    config_from: Source,
    flags: Sequence[Flag],
    arguments: Sequence[str],
    needs_workdir: bool = True,
) -> tuple[argparse.Namespace, ConfigDict]:
    """The plain flags and the config with its overrides.

    Raises:
      ValueError: an unknown or ill-typed flag or config key, or a config that cannot be read.
    """
    overrides, others = _split(arguments)
    parser = _Parser(
        prog=name,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.SECTION.KEY=VALUE sets any key; configs/base.py explains them all",
    )
    either = config_from == "workdir or checkpoint"
    if either:
        parser.add_argument("--hf", type=Path, metavar="DIR", help="a Hugging Face checkpoint")
    if either or config_from == "file":
        parser.add_argument(
            "--config", metavar="FILE[:ARG]", help="experiment, such as configs/tiny.py"
        )
    if needs_workdir:
        parser.add_argument("--workdir", type=Path, metavar="DIR", help="the run's folder")
    for flag in flags:
        if flag.type is bool:
            parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
            continue
        parser.add_argument(
            f"--{flag.name}",
            action="append" if flag.several else "store",
            type=flag.type,
            default=flag.default,
            help=flag.help,
            choices=flag.choices,
            required=flag.required,
        )
    parser.add_argument(
        "--debug", action="store_true", help="show stack traces and libraries' messages"
    )
    if needs_workdir:
        several = parser.add_argument_group(
            "several processes by hand (found under SLURM, Kubernetes, TPU)"
        )
        several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--num_processes", type=int, metavar="N", help="processes in all")
        several.add_argument("--process_id", type=int, metavar="I", help="this process, from 0")
    options, unknown = parser.parse_known_args(others)
    if unknown:
        raise ValueError(_unknown_flag(unknown[0], parser, name))

    return options, config_of(options, overrides, config_from, name)


def this_python() -> str:
    """How to call the running interpreter from here."""
    if shutil.which("python") == sys.executable:
        return "python"
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    return os.path.relpath(sys.executable) if inside else sys.executable


class _Parser(argparse.ArgumentParser):
    """argparse that raises its errors instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        message = re.sub("^argument ", "", message)
        no_value = r"\1: takes no value; give \1, or leave it out"
        message = re.sub("(.*): ignored explicit argument .*", no_value, message)
        raise ValueError(re.sub("invalid int value: (.*)", r"\1 should be a whole number", message))


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The config overrides, each as one `--config.KEY=VALUE`, and the other arguments."""
    overrides: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(("--config.", "--noconfig.")):
            others.append(argument)
        elif "=" in argument or not rest or rest[0].startswith("--"):
            overrides.append(argument)
        else:
            overrides.append(f"{argument}={rest.pop(0)}")
    return overrides, others


def _unknown_flag(argument: str, parser: argparse.ArgumentParser, name: str) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    flag = argument.partition("=")[0]
    if flag.endswith(".py") and "--config" in known:
        return f"{argument}: not a flag; did you mean --config={argument}?"
    if flag == "--config":
        return (
            f"{argument}: {name} takes the config from --workdir; change it by --config.KEY=VALUE"
        )
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    close = close or [f"--{key}" for key in keys_named(flag.lstrip("-"))]
    end = f"did you mean {close[0]}?" if close else f"{name} --help lists them"
    return f"{flag}: no such flag of {name}; {end}"


def _silence(debug: bool) -> None:
    """Keeps the notes of libraries off the terminal; warnings are one line each."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if debug else "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(handlers=[handler])  # does nothing where there is a handler already
    if not debug and sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        # What Orbax had yet to write when a save failed: the failure itself is said elsewhere.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    from absl import flags
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING if debug else absl_logging.ERROR)
    if not flags.FLAGS.is_parsed():  # libraries look up absl flags, of which we have none
        flags.FLAGS.mark_as_parsed()


def hide_cuda() -> None:
    """Where there is no NVIDIA GPU, keeps JAX from loading the plug-in for them.

    It is there to compile for GPUs elsewhere (extra gpu-target), in a process of its own; in this
    one it would say at length that it finds no driver. JAX_PLATFORMS=cuda loads it all the same.
    """
    devices = os.listdir("/dev") if os.path.isdir("/dev") else []
    here = any(name.startswith(("nvidia", "nvhost", "dxg")) for name in devices)
    if here or "cuda" in os.environ.get("JAX_PLATFORMS", ""):
        return
    with contextlib.suppress(ModuleNotFoundError):  # no plug-in at all
        name = "jax_plugins.xla_cuda12"
        spec = importlib.util.find_spec(name)
        if spec is not None and name not in sys.modules:
            plugin = importlib.util.module_from_spec(spec)
            vars(plugin)["initialize"] = lambda: None  # what JAX calls
            sys.modules |= {name: plugin, "jax_cuda12_plugin": None}  # type: ignore[dict-item]


class _Line(logging.Formatter):
    """`warning: ...`, as errors are `error: ...`."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Leaves out what TensorStore's threads say, one after another, once a save has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines) == 1 else f"{lines[0]} (more with --debug)"


def _report(line: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)
    return code


def _leave(code: int) -> NoReturn:
    """Exits; one of several processes that failed does so at once, not waiting for the others."""
    jax = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
