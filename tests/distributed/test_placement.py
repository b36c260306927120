"""The planner against exhaustive search, placements by name, and runs with unequal placements."""

import json
import math
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_cts.distributed.balance import loads, named_assignment, plan
from dist_cts.distributed.placement import Placement, data_group, even_assignment
from dist_cts.run import train as training
from dist_cts.run.config import TrainConfig
from dist_cts.run.costs import STEP_SECONDS
from dist_cts.run.hooks import Hooks

COSTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


def best_of_all(costs, world_size, batch_size):
    """The least maximal load over every placement, found by trying every set of ranks for every task."""
    sizes = [size for size in range(1, world_size + 1) if size == 1 or batch_size % size == 0]
    sets = [ranks for bits in range(1, 2**world_size)
            if len(ranks := tuple(r for r in range(world_size) if bits >> r & 1)) in sizes]  # fmt: skip
    least = math.inf
    for assignment in product(sets, repeat=len(costs)):
        taken = [rank for ranks in assignment for rank in ranks]
        shared = {rank for ranks in assignment if len(ranks) > 1 for rank in ranks}
        if set(taken) == set(range(world_size)) and all(taken.count(rank) == 1 for rank in shared):
            least = min(least, max(loads(assignment, costs)))
    return least


@given(costs=st.lists(st.floats(0.01, 100), min_size=1, max_size=4), world_size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("batch_size", [1, 8, 12])
def test_few_tasks_get_almost_the_best_placement_of_all(batch_size, costs, world_size):
    best = best_of_all(costs, world_size, batch_size)
    if best == math.inf:
        with pytest.raises(ValueError, match=f"{len(costs)} tasks do not fit {world_size} ranks"):
            plan(costs, world_size, [batch_size] * len(costs))
    else:
        assignment = plan(costs, world_size, [batch_size] * len(costs))
        assert best <= max(loads(assignment, costs)) * (1 + 1e-9) <= 4 / 3 * best * (1 + 2e-9)


@given(costs=COSTS, world_size=st.integers(1, 40), batch_size=st.sampled_from([32, 96, 128]))
@settings(max_examples=200, deadline=None)
def test_every_task_has_ranks_no_rank_is_idle_and_the_busiest_has_no_more_than_evenly(costs, world_size, batch_size):
    try:
        assignment = plan(costs, world_size, [batch_size] * len(costs))
    except ValueError:
        assert world_size > len(costs)
        return
    places = [Placement(assignment, world_size, rank) for rank in range(world_size)]
    assert len(assignment) == len(costs)
    assert sorted({task for place in places for task in place.local_tasks}) == list(range(len(costs)))
    for place in places:
        assert place.local_tasks
        assert place.data_ranks == 1 or len(place.local_tasks) == 1
        assert batch_size % place.data_ranks == 0
    if world_size <= len(costs):
        assert max(loads(assignment, costs)) <= max(loads(even_assignment(len(costs), world_size), costs))


def test_equal_tasks_keep_the_even_placement():
    for tasks, world_size in ((8, 8), (8, 2), (8, 3), (2, 4), (1, 1), (1024, 1024), (8, 1024)):
        assert plan([3.0] * tasks, world_size, [128] * tasks) == even_assignment(tasks, world_size)


def test_a_heavy_task_is_shared_and_light_ones_are_packed():
    assert plan([1, 9, 1, 1], 4, [32] * 4) == ((2,), (0, 1), (3,), (2,))
    assert plan([1, 9, 1, 1], 2, [1] * 4) == ((1,), (0,), (1,), (1,))  # of a batch that cannot be shared


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": [0], "b": [1], "x": [0]}, "unknown task 'x'; the tasks are a, b"),
        ({"a": [0, 1]}, "task b has no rank"),
        ({"a": [0], "b": []}, "task b has no rank"),
        ({"a": [0], "b": [2]}, "task b is on rank 2, but ranks are 0 to 1"),
        ({"a": [0], "b": [-1]}, "task b is on rank -1, but ranks are 0 to 1"),
        ({"a": [0, 0], "b": [1]}, r"task a lists a rank twice: \[0, 0\]"),
        ({"a": [0, 1], "b": [1]}, "rank 1 shares task a and also has b"),
        ({"a": [0], "b": [0]}, "rank 1 of 2 has no task"),
    ],
)
def test_a_placement_by_name_that_does_not_fit_is_refused(mapping, message):
    with pytest.raises(ValueError, match=message):
        named_assignment(mapping, ["a", "b"], 2)


def run(rank, tasks, folder, placement="even", reduction="mean", episodes=2):
    """phi after 10 steps per episode on four tasks, the assignment, the measured costs and the log."""
    config = TrainConfig(
        tasks=["a", "b", "c", "d"], data={"root": tasks}, run_dir=folder, model={"name": "tiny"}, batch_size=8,
        meta_lr=0.5, inner_steps=10, episodes=episodes, reduction=reduction, placement=placement,
    )  # fmt: skip
    seen = []

    class Seen(Hooks):
        def __init__(self, config, state, algorithm, placement, *rest):
            seen[:] = state.phi, placement.assignment
            super().__init__(config, state, algorithm, placement, *rest)

    training.Hooks = Seen
    training.process_group = lambda device, timeout_seconds: nullcontext()  # the ranks are in one already
    with redirect_stderr(StringIO()) as said:
        assert training.train(config) == 0
    costs = folder / STEP_SECONDS
    return *seen, json.loads(costs.read_text()) if costs.exists() else None, said.getvalue()


SHARED = {"c": [2, 0], "a": [1], "b": [3], "d": [1]}  # a data group, and ranks with one task and with two


def test_phi_does_not_depend_on_the_placement(run_ranks, tasks, tmp_path):
    [(even, *_)] = run_ranks(1, run, tasks, tmp_path / "even")
    seen = run_ranks(2, run, tasks, tmp_path / "auto", "auto") + run_ranks(4, run, tasks, tmp_path / "named", SHARED)
    assert seen[-1][1] == ((1,), (3,), (0, 2), (1,))
    for phi, *_ in seen:
        torch.testing.assert_close(phi, even, rtol=0, atol=1e-6)


def test_a_run_resumes_on_another_placement(run_ranks, tasks, tmp_path):
    """Ordered, so that a task that has one rank before and after gives the same bits."""
    [(expected, *_)] = run_ranks(1, run, tasks, tmp_path / "uninterrupted", "even", "ordered")
    run_ranks(1, run, tasks, tmp_path / "x", "even", "ordered", 1)
    for phi, assignment, *_ in run_ranks(2, run, tasks, tmp_path / "x", SHARED | {"b": [0], "c": [1]}, "ordered"):
        assert assignment == ((1,), (0,), (1,), (1,))
        assert torch.equal(phi, expected)


def test_auto_plans_from_step_times_that_rank_0_measures_once_for_all(run_ranks, tasks, tmp_path):
    seen = run_ranks(2, run, tasks, tmp_path, "auto", "mean", 1)
    assert seen[0][1:3] == seen[1][1:3]
    _, assignment, costs, _ = seen[0]
    assert assignment == plan(list(costs.values()), 2, [8] * 4)
    assert costs["a"] == costs["c"]  # 8 px
    assert costs["b"] == costs["d"]  # 12 px
    file = tmp_path / "step_seconds.json"
    assert json.loads(file.read_text()) == costs
    file.write_text(json.dumps(kept := {"a": 0.1, "b": 0.001, "c": 0.1, "d": 0.001}))
    resumed = run_ranks(2, run, tasks, tmp_path, "auto")
    for _, assignment, costs, _ in resumed:
        assert costs == kept
        assert assignment == ((0,), (0,), (1,), (1,))
    assert "placement on ranks: a, b on 0; c, d on 1; 101 ms per step" in resumed[0][-1]
    assert "placement" not in resumed[1][-1]


def test_unequal_data_groups_of_a_64_rank_job_without_one():
    assignment = plan([float(pixels**2) for pixels in (28, 28, 28, 32, 32, 64, 84, 84)], 64, [128] * 8)
    dist.init_process_group("fake", rank=13, world_size=64, store=FakeStore())
    try:
        place = Placement(assignment, 64, 13)
        assert data_group(place).size() == place.data_ranks > 1
    finally:
        dist.destroy_process_group()
    assert len({len(ranks) for ranks in assignment}) > 1
