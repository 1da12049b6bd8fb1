"""Which layers of the model each chunk of a pipeline has; plain Python.

Chunks need not have as many layers each. A stage whose chunk has the loss head, which costs as much
as some layers, gets fewer of them; and where the layers do not divide, the surplus goes where it
lengthens no tick. What a layer, the embedding and the head cost is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, permutations

from parallel.schedule import Schedule


@dataclass(frozen=True)
class Costs:
    """What the parts of a model cost, in any one unit.

    Attributes:
      layer: of each layer, or of every one.
      first: of what is done beside the layers at the first position: the embedding.
      last: at the last position: head and loss.
    """

    layer: float | tuple[float, ...] = 1.0
    first: float = 0.0
    last: float = 0.0


@dataclass(frozen=True)
class Division:
    """The number of layers at each position, in the order of the model.

    Attributes:
      layers: of each position; whole periods of layer kinds, at least one.
    """

    layers: tuple[int, ...]

    @property
    def most(self) -> int:
        """Of any position."""
        return max(self.layers)

    @property
    def even(self) -> bool:
        """Whether all positions have as many."""
        return len(set(self.layers)) == 1

    def first(self, position: int) -> int:
        """The number of a position's first layer in the model."""
        return sum(self.layers[:position])

    def in_rows(self, schedule: Schedule) -> bool:
        """Whether the stages' layers are equal blocks of the model's, one after the other."""
        return schedule.chunks == 1 and self.even

    def rows(self, schedule: Schedule) -> list[int]:
        """The layer in each row of the stages' stacked arrays, stage by stage, chunk by chunk.

        A chunk has `most` rows. Those beyond its layers hold -1: nothing that is computed with.
        """
        assert len(self.layers) == schedule.positions, (self, schedule.positions)
        rows = []
        for stage in range(schedule.stages):
            for chunk in range(schedule.chunks):
                position = schedule.position(stage, chunk)
                first, number = self.first(position), self.layers[position]
                rows += [*range(first, first + number), *[-1] * (self.most - number)]
        return rows


def divide(
    layers: int,
    positions: int,
    period: int = 1,
    costs: Costs | None = None,
    stages: Sequence[int] | None = None,
) -> Division:
    """Balances a model: the most loaded stage has as little as can be, then the most loaded
    position, then the second most, and so on; what is left goes to the most even numbers.

    Exact where every period of layers costs the same, or each stage has one position. Otherwise the
    most loaded position is minimised exactly, and the stages by moving single periods from there.

    Args:
      layers: of the model.
      positions: chunks that it is cut into.
      period: of the pattern of layer kinds; no cut goes through one.
      costs: of the parts; without them every layer costs 1 and nothing else does.
      stages: the stage of each position; without them each has its own.

    Raises:
      ValueError: there are fewer periods than positions, or the last one is not whole, naming
        config.model.layers.
    """
    check_layers(layers, positions, period)
    costs = costs or Costs()
    each = costs.layer if isinstance(costs.layer, tuple) else (costs.layer,) * layers
    assert len(each) == layers, (costs, layers)
    before = [0.0, *accumulate(sum(each[i : i + period]) for i in range(0, layers, period))]
    home = range(positions) if stages is None else stages
    total = before[-1] + costs.first + costs.last

    def load(position: int, start: int, end: int) -> float:
        """Of a position with these periods, as a share of the whole."""
        extra = costs.first * (position == 0) + costs.last * (position == positions - 1)
        return (before[end] - before[start] + extra) / total

    def falling(loads: Iterable[float]) -> list[float]:
        # Rounded, or the noise of summing would break ties.
        return sorted((round(load, 9) for load in loads), reverse=True)

    def badness(ends: Sequence[int]) -> tuple[list[float], ...]:
        starts = [0, *ends[:-1]]
        loads = [
            load(i, start, end) for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        of_stage = dict.fromkeys(home, 0.0)
        for stage, value in zip(home, loads, strict=True):
            of_stage[stage] += value
        numbers = falling(end - start for start, end in zip(starts, ends, strict=True))
        return falling(of_stage.values()), falling(loads), numbers

    ends = _least_load(len(before) - 1, positions, load)
    best = badness(ends)
    moved = True
    while moved:  # each round is strictly better, so it ends
        moved = False
        for giver, taker in permutations(range(positions), 2):
            # The cuts between the two shift by one period.
            step = 1 if taker < giver else -1
            low, high = min(giver, taker), max(giver, taker)
            other = [end + step * (low <= i < high) for i, end in enumerate(ends)]
            if all(a < b for a, b in pairwise([0, *other])) and (bad := badness(other)) < best:
                ends, best, moved = other, bad, True
    return Division(
        tuple((end - start) * period for start, end in zip([0, *ends[:-1]], ends, strict=True))
    )


def _least_load(periods: int, positions: int, load: Callable[[int, int, int], float]) -> list[int]:
    """Where each position ends, so that the most loaded has least; by dynamic programming."""
    # best[end]: (the most load so far, the cuts) with the positions up to now ending there.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for position in range(positions):
        left = positions - 1 - position
        best = {
            end: min(
                (max(most, load(position, start, end)), [*ends, end])
                for start, (most, ends) in best.items()
                if start < end
            )
            for end in range(position + 1, periods - left + 1)
        }
    return best[periods][1]


def check_layers(layers: int, positions: int, period: int = 1) -> None:
    """Refuses a model that has no period of layers for some position.

    Raises:
      ValueError: naming config.model.layers.
    """
    least = positions * period
    kinds = f" of {period} kinds in config.model.pattern" if period > 1 else ""
    if layers < least:
        raise ValueError(
            f"config.model.layers = {layers}: config.mesh.pipe x chunks a stage = {positions} "
            f"chunks of layers{kinds} want at least {least}"
        )
    if layers % period:
        raise ValueError(
            f"config.model.layers = {layers} are no whole periods{kinds}; with config.mesh.pipe "
            f"choose a multiple of {period}"
        )
