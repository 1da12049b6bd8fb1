"""The schedules that ship, each in the forms that trade bubble for memory.

| schedule | paper |
| --- | --- |
| gpipe | Huang et al. 2018, https://arxiv.org/abs/1811.06965 |
| 1f1b | PipeDream-1F1B; Narayanan et al. 2020, https://arxiv.org/abs/2006.09503 |
| interleaved | Narayanan et al. 2021, https://arxiv.org/abs/2104.04473 |
| zb_h1 | Qi et al. 2023, https://arxiv.org/abs/2401.10241 |
| zb_v | Qi et al. 2024, https://arxiv.org/abs/2405.15362 |

The papers' stages are asynchronous. Here all stages change ticks together, and a tick is as long as
its slowest stage. So a schedule comes in up to three forms:

- wide: a tick holds an F, a B and a W, and as much is in flight as fills the middle of the table:
  2(p-s)-1 micro-batches from F to B on stage s of 1f1b and zb_h1, p in all on each stage of zb_v.
- lean: the same ticks with the papers' p-s micro-batches in flight: many ticks are half empty.
- single: the papers' orders, one action a tick. Lockstep costs nothing where F, B and W take
  equally long, else each tick is as long as the longest. Three times as many ticks and transfers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from parallel.schedule import Action, B, F, Schedule, W
from parallel.schedule_orders import from_orders

Form = Literal["wide", "lean", "single"]
# The first form has the bubble that the paper promises; `parallel/schedule_costs.py` compares them.
FORMS: dict[str, tuple[Form, ...]] = {
    "gpipe": ("wide",),
    "1f1b": ("wide", "lean", "single"),
    "interleaved": ("wide", "single"),
    "zb_h1": ("wide", "lean", "single"),
    "zb_v": ("single", "wide"),
}


@lru_cache(maxsize=256)
def make_schedule(
    name: str,
    stages: int,
    microbatches: int,
    chunks: int | None = None,
    form: Form | None = None,
) -> Schedule:
    """The table of a schedule by name.

    Args:
      name: a key of `FORMS`.
      stages: p, as many as `config.mesh.pipe`.
      microbatches: m; gpipe takes any number, interleaved multiples of p, others p and more. From
        2p - 1 on, zb_v leaves no stage idle between its first and its last action.
      chunks: v, of the layers of a stage; 2 if not given for interleaved and zb_v, else 1.
      form: one of `FORMS[name]`; the first if not given.

    Raises:
      ValueError: naming the config key, its value and what would be right.
    """
    check_names(name, form)
    if stages < 1:
        raise ValueError(f"config.mesh.pipe = {stages}: a pipeline has at least one stage")
    form = form or FORMS[name][0]
    usual = 2 if name in ("interleaved", "zb_v") else 1
    chunks = usual if chunks is None else chunks
    if chunks < 1 or (name != "interleaved" and chunks != usual):
        right = "1 or more" if name == "interleaved" else str(usual)
        raise ValueError(f"config.pipeline.chunks = {chunks}: {name} wants {right}")
    least = 1 if name == "gpipe" else stages
    if microbatches < least:
        raise ValueError(
            f"config.pipeline.microbatches = {microbatches}: {name} needs at least {least} for "
            f"{stages} stages" + ("" if name == "gpipe" else "; gpipe takes any number")
        )
    if name == "interleaved" and microbatches % stages:
        below = microbatches - microbatches % stages
        raise ValueError(
            f"config.pipeline.microbatches = {microbatches}: interleaved needs a multiple of the "
            f"{stages} stages, such as {below} or {below + stages}"
        )
    p, m, title = stages, microbatches, _title(name, form, chunks)
    if name == "gpipe":
        return from_orders(title, _gpipe(p, m))
    if name == "zb_v":
        if form == "single":
            return from_orders(title, [_zb_v(s, p, m) for s in range(p)], path="v", single=True)
        return from_orders(title, [_v(s, p, m) for s in range(p)], path="v", held=2 * p)
    if name == "zb_h1" and form == "single":
        return from_orders(title, [_zb_h1(s, p, m) for s in range(p)], single=True)
    wide = form == "wide" or name == "interleaved"
    orders = [_one_f_one_b(s, p, m, chunks, wide=wide) for s in range(p)]
    if name == "zb_h1":
        return from_orders(title, orders, held=2 * p - 1 if wide else p + 1)
    return from_orders(title, orders, single=form == "single")


def check_names(name: str, form: str | None) -> None:
    """Refuses a schedule, or a form of it, that there is not.

    Raises:
      ValueError: naming the config key, its value and what there is.
    """
    if name not in FORMS:
        raise ValueError(f"config.pipeline.schedule = {name!r}: choose one of {', '.join(FORMS)}")
    if form and form not in FORMS[name]:
        raise ValueError(
            f"config.pipeline.form = {form!r}: {name} comes as {', '.join(FORMS[name])}"
        )


def _title(name: str, form: Form, chunks: int) -> str:
    rounds = f", {chunks} chunks" if name == "interleaved" else ""
    return name + rounds + (f", {form}" if len(FORMS[name]) > 1 else "")


def _alternating(
    forwards: Sequence[Action], backwards: Sequence[Action], in_flight: int
) -> list[Action]:
    """`in_flight` forwards, then backward and forward in turns."""
    order = list(forwards[:in_flight])
    for i, backward in enumerate(backwards):
        order += [backward, *forwards[in_flight + i : in_flight + i + 1]]
    return order


def _gpipe(p: int, m: int) -> list[list[Action]]:
    """All forwards, then all backwards, the last first."""
    order = [F(i) for i in range(m)] + [B(i) for i in reversed(range(m))]
    return [order] * p


def _one_f_one_b(s: int, p: int, m: int, v: int, *, wide: bool) -> list[Action]:
    """1F1B, with v > 1 interleaved: p micro-batches pass a chunk, then p the next chunk.

    A result of the last stage is back on stage s after 2(p-s-1) ticks of one forward each. That is
    how far ahead interleaved runs in its paper; for v = 1 half as far is enough where stages do not
    wait for each other's ticks.
    """
    turns = [(r, c, i) for r in range(0, m, p) for c in range(v) for i in range(r, min(r + p, m))]
    ahead = 2 * (p - s - 1) + (v - 1) * p if wide else p - s - 1
    return _alternating(
        [F(i, c) for _, c, i in turns], [B(i, v - 1 - c) for _, c, i in turns], ahead + 1
    )


def _zb_h1(s: int, p: int, m: int) -> list[Action]:
    """1F1B where stage s is s weight gradients behind: no more is alive than on the first stage."""
    order = [F(i) for i in range(p - s - 1)]
    for i in range(m):
        order += [F(i + p - s - 1)] * (i + p - s - 1 < m) + [B(i)] + [W(i - s)] * (i >= s)
    return order + [W(i) for i in range(m - s, m)]


def _zb_v(s: int, p: int, m: int) -> list[Action]:
    """Each stage holds p micro-batches, two chunks each, and then goes F, B, W of either in turns.

    In units of F = B = W, micro-batch 0 is back from the turn of the V after the first 2(p-s) - 1
    forwards, and each later value arrives when its turn comes.
    """
    turns = ["F0"] * (2 * (p - s) - 1) + ["F1", "F0"] * s + ["F1", "B1", "W1"] * (p - s)
    turns += ["F0", "B0", "W0", "F1", "B1", "W1"] * (m - p)
    turns += ["B0", "B1"] * s + ["B0", "W0"] * (p - s) + ["W1"] * s + ["W0"] * s
    order: list[Action] = []
    done = dict.fromkeys(turns, 0)
    for turn in turns:
        if done[turn] < m:  # of F0 there are turns to spare
            order.append(Action(turn[0], done[turn], int(turn[1])))
            done[turn] += 1
    return order


def _v(s: int, p: int, m: int) -> list[Action]:
    """F and B of a V in ticks of one each: micro-batch i enters in tick 2i and turns at once.

    On each stage, the F's of one chunk are in even ticks and those of the other in odd ones; so are
    the B's.
    """
    timed = [
        timing
        for i in range(m)
        for timing in (
            (2 * i + s, 0, F(i, 0)),
            (2 * i + 2 * p - 1 - s, 0, F(i, 1)),
            (2 * i + 2 * p - 1 + s, 1, B(i, 1)),
            (2 * i + 4 * p - 2 - s, 1, B(i, 0)),
        )
    ]
    return [action for _, _, action in sorted(timed)]
