"""The part of Orbax that checkpoints use: nested dicts of arrays, written in the background."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# Seconds that a save may take; where one process of several fails, the others wait that long.
TIMEOUT = 1200


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


# One failed write is logged several times, with stack traces; `Checkpoints` says it once.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_from_orbax)


def make_checkpointer(attempt: int = 0) -> ocp.AsyncCheckpointer:
    """A checkpointer for one save, the `attempt`-th of this run on all processes.

    Its barriers bear that number: where one process alone failed, the others are a barrier ahead of
    it, and with barriers of one name no later save would ever succeed.
    """
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(),
        async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT),
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=f"attempt{attempt}"
        ),
    )


def save(checkpointer: ocp.AsyncCheckpointer, path: Path, tree: dict[str, Any]) -> None:
    """Copies `tree` to the host and begins to write it to `path`."""
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def restore(path: Path, abstract: dict[str, Any], partial: bool) -> dict[str, Any]:
    """Reads the arrays of `abstract` (with shardings): all there are at `path`, or a part."""
    how = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        ),
        abstract,
    )
    arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=partial)
    with make_checkpointer() as checkpointer:
        return checkpointer.restore(path, args=arguments)
