"""The mean over tasks and the control tail."""

from types import SimpleNamespace

import pytest
import torch

from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import overlapping_groups
from dist_cts.distributed.reducer import MetaReducer, collectives


class StubLearner:
    """The part of a learner that the reducer uses."""

    def __init__(self, task):
        self.task, self.flag = task, torch.zeros(1)

    def flag_nonfinite(self, flag):
        self.flag += flag

    def take_counters(self):
        taken = torch.tensor([2.0, 2.0 * self.task, 1.0, self.flag.item()])
        self.flag.zero_()
        return taken

    def take_wait_seconds(self):
        return 0.25


def reduce(rank, world_size, tasks, reduction, poisoned=None, stopper=None):
    placement = place(tasks, world_size, rank)
    learners = [StubLearner(task) for task in placement.local_tasks]
    reducer = MetaReducer(torch.zeros(5), learners, placement, reduction)
    reducer.stop_requested = rank == stopper
    means, controls = [], []
    for step in (1, 2, 3):
        gradients = [torch.full((5,), float(step * (learner.task + 1))) for learner in learners]
        for gradient, learner in zip(gradients, learners, strict=True):
            if learner.task == poisoned and step == 2:
                gradient[3] = float("nan")
        reducer.start(gradients, step)
        means += [mean.clone() for mean in reducer.finished(step)]
        controls += reducer.received()
    controls += reducer.received(flush=True)
    return SimpleNamespace(means=means, controls=controls)


@pytest.mark.parametrize("reduction", ["mean", "ordered"])
@pytest.mark.parametrize(("world_size", "tasks"), [(1, 3), (2, 3), (2, 2), (4, 2)])
def test_the_mean_over_tasks_on_every_layout(run_ranks, reduction, world_size, tasks):
    for result in run_ranks(world_size, reduce, world_size, tasks, reduction):
        for step, mean in enumerate(result.means, 1):
            torch.testing.assert_close(mean, torch.full((5,), step * (tasks + 1) / 2))
        assert [control.step for control in result.controls] == [1, 2, 3]
        control = result.controls[0]
        assert control.steps.tolist() == [2.0] * tasks
        assert control.loss.tolist() == [float(task) for task in range(tasks)]
        assert control.metric.tolist() == [0.5] * tasks
        assert control.wait_seconds.tolist() == [
            0.25 * len(place(tasks, world_size, r).local_tasks) for r in range(world_size)
        ]
        assert not control.stop
        assert control.nonfinite == []


@pytest.mark.parametrize("reduction", ["mean", "ordered"])
def test_a_nonfinite_task_is_left_out_and_named_on_every_rank(run_ranks, reduction):
    for result in run_ranks(2, reduce, 2, 4, reduction, 2):
        assert torch.equal(result.means[1], torch.full((5,), 2 * (1 + 2 + 0 + 4) / 4))
        assert [control.nonfinite for control in result.controls] == [[], [2], []]


def test_one_rank_s_stop_request_reaches_all_at_the_same_step(run_ranks):
    for result in run_ranks(3, reduce, 3, 3, "mean", None, 1):
        assert [control.stop for control in result.controls] == [True, True, True]


def reduce_late(rank, reduction, wire):
    """What rank 1's stop request after step 2 and task 0's NaN in step 3 are to this rank, and when it knows."""
    groups = overlapping_groups(torch.device("cpu"), 3 * collectives(wire), 30)
    learner = StubLearner(rank)
    options = {"wire": wire, "delay": 2, "groups": groups}
    reducer = MetaReducer(torch.zeros(5), [learner], place(2, 2, rank), reduction, **options)
    seen, means = [], []
    for step in range(1, 9):
        reducer.stop_requested = rank == 1 and step > 2
        value = float("nan") if (rank, step) == (0, 3) else float(step)
        if step % 4 == 0:
            reducer.exchange(step)
        else:
            reducer.start([torch.full((5,), value)], step)
        means += [(step, mean[0].item()) for mean in reducer.finished(step, flush=step == 8)]
        if step == 6:
            reducer.drain()
        seen += [(step, control.step, control.stop, control.nonfinite) for control in reducer.received(flush=step == 8)]
    return seen, means


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "ordered"])
def test_delayed_ranks_agree_on_stop_and_nan_at_one_step_and_apply_every_mean_in_time(run_ranks, reduction, wire):
    for seen, means in run_ranks(2, reduce_late, reduction, wire):
        # Step 4 has no mean; a tail is read one reduction after its own; at step 6 all in flight are waited for.
        assert means == [(3, 1.0), (4, 2.0), (5, 1.5), (7, 5.0), (8, 6.0), (8, 7.0)]
        assert seen == [
            (4, 1, False, []),
            (5, 2, False, []),
            (6, 3, True, [0]),
            (6, 4, True, []),
            (6, 5, True, []),
            (8, 6, True, []),
            (8, 7, True, []),
            (8, 8, True, []),
        ]


def leave_lock_step(rank):
    placement = place(2, 2, rank)
    reducer = MetaReducer(torch.zeros(5), [StubLearner(rank)], placement)
    reducer.exchange(5 + rank)
    reducer.finished(5 + rank)
    try:
        reducer.received(flush=True)
    except RuntimeError as error:
        return str(error)


def test_ranks_at_different_steps_are_noticed(run_ranks):
    for rank, message in enumerate(run_ranks(2, leave_lock_step)):
        assert message.startswith(f"the ranks are out of sync at step {5 + rank}")


def send_in_bf16(rank):
    """Means and controls at a step that bfloat16 cannot hold, of values that it rounds."""
    reducer = MetaReducer(torch.zeros(2), [StubLearner(rank)], place(2, 2, rank), wire="bf16")
    reducer.start([torch.tensor([1 + 2**-8 + 2**-10, 3.0])], 4095)
    (mean,) = reducer.finished(4095)
    return mean.clone(), reducer.received(flush=True)


def test_bf16_rounds_the_vectors_and_not_the_control_tail(run_ranks):
    for mean, (control,) in run_ranks(2, send_in_bf16):
        assert mean.dtype == torch.float32
        assert mean.tolist() == [1 + 2**-7, 3.0]
        assert control.step == 4095  # and the ranks agree on it
        assert control.wait_seconds.tolist() == [0.25, 0.25]


def test_one_collective_per_step_and_its_bytes_at_64_ranks(monkeypatch):
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=13, world_size=64, store=FakeStore())
    try:
        sent = []
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, **options: sent.append(tensor.numel()))
        reducer = MetaReducer(torch.zeros(1000), [StubLearner(13)], place(64, 64, 13))
        reducer.start([torch.ones(1000)], 1)
    finally:
        dist.destroy_process_group()
    assert sent == [1000 + 2 + 64 + 4 * 64]
