"""A leak is named by file and line; what only goes up and down, or fills up, is not."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import pytest

from memory.leaks import LeakWatch, Rising, census, site


def here() -> int:
    """The line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def found_at(leak_at, steps: int = 20) -> tuple[int, list]:
    """The step at which `leak_at(step)`, called in every step, is found, and what is said."""
    watch = LeakWatch()
    for step in range(1, steps + 1):
        leak_at(step)
        if leaks := watch.look():
            return step, leaks
    return 0, []


@pytest.fixture
def kept():
    """A list that is emptied, so that no test leaks into the next."""
    arrays: list[jax.Array] = []
    yield arrays
    arrays.clear()


def test_one_array_a_step_is_named_within_twenty_steps(kept):
    line = here() + 1
    step, (leak,) = found_at(lambda step: kept.append(jnp.full((3, 5), step, jnp.float32)))
    assert step <= 20
    assert leak.site.file == __file__
    assert leak.site.line == line
    assert leak.kinds == ("float32[3,5] SingleDeviceSharding",)
    assert leak.grown * 60 == leak.bytes
    assert f"tests/memory/test_leaks.py:{line} " in str(leak)


def test_it_is_named_once(kept):
    watch, said = LeakWatch(), []
    for _ in range(100):
        kept.append(jnp.zeros(3))
        said += watch.look()
    assert len(said) == 1


def test_the_leak_starts_late_and_is_one_kind_of_many(kept, use_mesh):
    # As train.py's loop: a donated state, a batch, metrics of which one is kept from step 30.
    with use_mesh(fsdp=4):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp"))
        state = jax.device_put(jnp.zeros(8), sharding)
        add = jax.jit(lambda s, b: (s + 1, {"loss": s.sum() + b.sum()}), donate_argnums=0)
        compiled = add.lower(state, jnp.ones(4)).compile()
        watch, last = LeakWatch(), None
        for step in range(1, 60):
            state, metrics = compiled(state, jnp.ones(4))
            line = here() - 1
            if step >= 30:
                kept.append(metrics["loss"])
            last = metrics  # the step before is let go only now
            if leaks := watch.look():
                break
    assert last is not None
    assert step <= 30 + 20
    (leak,) = leaks
    assert (leak.site.file, leak.site.line) == (__file__, line)


def test_arrays_of_one_line_are_one_leak(kept):
    add = jax.jit(lambda x: (x + 1, x + 2, x.sum()))
    x = add(jnp.zeros(3))[0]  # a first call has another stack, through the compiler
    _, (leak,) = found_at(lambda step: kept.append(add(x)))
    assert leak.count == len(kept) * 3
    assert leak.kinds == ("float32[3] SingleDeviceSharding", "float32[] SingleDeviceSharding")
    assert "and other kinds (1)" in str(leak)


@pytest.mark.parametrize(
    "counts",
    [
        [7] * 500,
        [1 + step % 7 for step in range(500)],  # up and down, out of step with the windows
        [min(step, 9) for step in range(500)],  # fills up, as a buffer does
        [2 if step % 70 < 3 else 5 for step in range(500)],  # let go at an evaluation
        [min(step // 50, 3) for step in range(2000)],  # a few, one after the other
    ],
)
def test_what_does_not_rise_for_good_is_no_leak(counts):
    watch = Rising()
    assert [growth for count in counts if (growth := watch.add(count))] == []


@pytest.mark.parametrize(("every", "within"), [(1, 16), (2, 16), (8, 64), (50, 1024)])
def test_how_soon_a_count_that_rises_is_found(every, within):
    watch = Rising()
    found = next(step for step in range(1, 2000) if watch.add(3 + step // every))
    assert found <= within


def test_garbage_in_cycles_is_no_leak():
    class Holder:
        def __init__(self):
            self.me, self.array = self, jnp.zeros((7, 7))

    assert found_at(lambda step: Holder(), 40) == (0, [])


def test_an_array_of_a_library_is_put_down_to_who_called_it(kept):
    line = here() + 1
    kept.append(jax.random.normal(jax.random.key(0), (3, 11)))
    (kind,) = [kind for kind in census() if kind[1] == (3, 11)]
    assert site(kind[0])[:2] == (__file__, line)
    assert site(None) is None
