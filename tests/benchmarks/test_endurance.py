"""The endurance benchmark: a run that becomes slower is told from a machine that does."""

import pytest

from benchmarks.endurance import beside_fresh, compare


def samples(steps, milliseconds):
    """One sample every 100 steps; `milliseconds(step)`: time, and CPU time of two ranks, per step."""
    values, time, figures = [], 0.0, {"open files": 20, "console, bytes": 0}
    for step in range(100, steps + 1, 100):
        time += 100 * milliseconds(step)
        values.append(figures | {"step": step, "time, ms": time, "CPU time, ms": 2 * time, "console, bytes": 3 * step})
    return values


def test_the_load_of_the_machine_affects_both_runs_and_age_only_one():
    def load(step):
        return 8 if step < 5000 else 20

    fresh = samples(10_000, load)
    for age in (1, 1.1):
        old = samples(10_000, lambda step, age=age: age * load(step))
        for ratio in beside_fresh(list(zip(old, fresh, strict=True))).values():
            assert ratio["median"] == pytest.approx(age)
            assert ratio["low"] == pytest.approx(ratio["high"])


def test_the_first_and_the_last_tenth_are_compared_per_step():
    rows = {row["figure"]: row for row in compare(samples(10_000, lambda step: 8 if step < 5000 else 20))}
    assert rows["open files"]["first tenth"] == rows["open files"]["last tenth"] == 20
    assert rows["console, bytes per step"]["last tenth"] == pytest.approx(3)
    for key in ("CPU time, ms per step", "step time, ms, median"):
        assert rows[key]["last tenth"] == pytest.approx(2.5 * rows[key]["first tenth"])
