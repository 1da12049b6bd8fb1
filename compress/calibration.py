"""Calibration text, and the model that reads it: on one device, whatever the layout is.

What calibrated methods choose hangs together: a code that falls to the other side changes the
errors of all later rows of its channel, and what later layers are given. Sums over several devices
differ in the last bits from those of one, which was enough for 2% of GPTQ's codes to differ between
layouts. One layer at a time fits on one device, and its sums are the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from training.micro_batches import Batch
from training.state import Model


@dataclass(frozen=True)
class Calibration:
    """Text and its reader.

    Attributes:
      model: dense, of a mesh of one device, without stages, and with the policy
        `parallel.remat.FORWARD`.
      mesh: of that device.
      batches: on it, with `tokens` and whatever the family reads.
    """

    model: Model
    mesh: jax.sharding.Mesh
    batches: Sequence[Batch]

    def here(self, tree: Any) -> Any:
        """Arrays of any layout, whole on the device."""
        return jax.device_put(tree, NamedSharding(self.mesh, jax.P()))
