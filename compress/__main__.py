"""Makes a run's model smaller and writes it as a run of its own, which every command reads.

    python -m compress quantize --workdir=runs/dense --out=runs/int8 --form=int8
    python -m compress quantize --workdir=runs/dense --out=runs/int4 --form=int4:128 --method=gptq
    python -m compress merge --workdir=runs/lora --out=runs/merged
    python -m compress factorize --workdir=runs/dense --out=runs/thin --keep=0.7
    python -m compress recipe --workdir=runs/dense --out=runs/recipe \
        --recipe=configs/recipes/small.py
    python -m compress report --workdir=runs/dense --runs=runs/int8,runs/int4 --out=runs/report

`python -m compress METHOD --help` lists the flags of one. docs/compression.md tells which to take.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cli
from parallel.huge_pages import use_huge_pages

OUT = cli.Flag("out", Path, None, "the folder of the new run; it is not there yet", required=True)
STEP = cli.Flag("step", int, None, "the step to read; default: the newest")


@dataclass(frozen=True)
class Method:
    """A command: its main, its flags, a line about it."""

    main: Callable[..., None]
    flags: tuple[cli.Flag, ...]
    about: str


def methods() -> dict[str, Method]:
    """All of them by name."""
    import compress_factorize
    import compress_merge
    import compress_prune
    import compress_quantize
    import compress_shrink

    return {
        "quantize": Method(
            compress_quantize.main, compress_quantize.FLAGS, "Weights as codes and scales."
        ),
        "factorize": Method(
            compress_factorize.main, compress_factorize.FLAGS, "Weights as two factors each."
        ),
        "prune": Method(compress_prune.main, compress_prune.FLAGS, compress_prune.ABOUT),
        "shrink": Method(compress_shrink.main, compress_shrink.FLAGS, compress_shrink.ABOUT),
        "merge": Method(compress_merge.main, (), compress_merge.ABOUT),
    }


def of_runs() -> dict[str, Method]:
    """Commands on the runs that methods write."""
    import compress_recipe
    import compress_report

    return {
        "recipe": Method(
            compress_recipe.main, compress_recipe.FLAGS, "Methods and training, one after another."
        ),
        "report": Method(
            compress_report.main, compress_report.FLAGS, "What runs weigh, cost and lose, compared."
        ),
    }


def flags_of(name: str) -> tuple[cli.Flag, ...]:
    """All that a command takes."""
    known = methods()
    return (OUT, STEP, *known[name].flags) if name in known else of_runs()[name].flags


def run(arguments: list[str]) -> None:
    """Finds the method and hands over."""
    known = methods() | of_runs()
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help"):
        print(f"{__doc__}\nMethods:")
        for each, entry in known.items():
            print(f"  {each:<12}{entry.about}")
        sys.exit(0 if name else cli.USER_ERROR)
    if name not in known:
        print(f"error: {name}: no such method; choose {', '.join(known)}", file=sys.stderr)
        sys.exit(cli.USER_ERROR)
    method = known[name]
    cli.run(
        method.main,
        name=f"python -m compress {name}",
        about=method.about,
        config_from="workdir",
        flags=flags_of(name),
        argv=arguments[1:],
    )


if __name__ == "__main__":
    use_huge_pages()
    # To end well when it is asked to: what waits in files is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(sys.argv[1:])
