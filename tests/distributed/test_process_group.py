"""Even placement, errors raised on all ranks, and consistency checks between ranks."""

import threading

import pytest
import torch
import torch.distributed as dist

from dist_cts.distributed import peer_failure, process_group
from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import check_layouts, check_same_bits, raise_on_all_ranks, select_device
from dist_cts.errors import RunError, UnreachableError
from dist_cts.flat import FlatLayout


@pytest.mark.parametrize(("tasks", "world_size"), [(8, 8), (8, 1), (8, 3), (5, 2), (64, 64), (1024, 1024), (8, 5)])
def test_every_task_has_one_rank_and_loads_differ_by_one_at_most(tasks, world_size):
    assignment = [place(tasks, world_size, rank) for rank in range(world_size)]
    assert [task for seat in assignment for task in seat.local_tasks] == list(range(tasks))
    loads = [len(seat.local_tasks) for seat in assignment]
    assert max(loads) - min(loads) <= 1
    assert all(seat.contributes and seat.data_ranks == 1 for seat in assignment)


def test_more_ranks_than_tasks_share_a_task_in_neighbouring_groups():
    assignment = [place(2, 6, rank) for rank in range(6)]
    assert [(list(seat.local_tasks), seat.data_rank) for seat in assignment] == [
        ([0], 0), ([0], 1), ([0], 2), ([1], 0), ([1], 1), ([1], 2),
    ]  # fmt: skip
    assert [seat.contributes for seat in assignment] == [True, False, False, True, False, False]


def test_a_world_size_that_fits_no_layout_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"4 tasks do not fit evenly on 6 ranks: start at most 4 ranks, .* such as 4 or 8"
    ):
        place(4, 6, 0)


def test_auto_takes_gpus_only_where_every_local_rank_has_one(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="8 ranks but 1 GPUs on this node"):
        select_device("cuda")


def fail_on_rank_1(rank):
    try:
        with raise_on_all_ranks():
            if rank == 1:
                raise FileNotFoundError("x.beton does not exist")
    except FileNotFoundError as error:
        return str(error)


def test_a_store_that_does_not_answer_bounds_the_rendezvous(monkeypatch):
    class CutOff:
        def set(self, *_):
            threading.Event().wait()

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(CutOff(), 1, 2)]))
    monkeypatch.setattr(process_group, "within", lambda seconds, call: peer_failure.within(seconds - 60, call))
    with (
        pytest.raises(UnreachableError, match=r"torchrun's store has not responded for 60\.1 s"),
        process_group.process_group(torch.device("cpu"), 55.1),
    ):
        pass


def test_an_error_of_one_rank_is_raised_on_all(run_ranks):
    assert run_ranks(3, fail_on_rank_1) == ["rank 1: x.beton does not exist"] * 3


def compare_layouts(rank):
    channels = 3 if rank == 2 else 4
    try:
        check_layouts(FlatLayout.of([("a", torch.zeros(2)), ("b", torch.zeros(channels))]))
    except ValueError as error:
        return str(error)


def test_a_layout_that_differs_names_both_ranks_and_the_first_difference(run_ranks):
    messages = run_ranks(3, compare_layouts)
    assert messages == [messages[0]] * 3
    assert "ranks 0 and 2" in messages[0]
    assert "tensor 1 is b [4]" in messages[0]
    assert "on rank 2 b [3]" in messages[0]


def compare_bits(rank):
    vector = torch.zeros(1000)
    check_same_bits(vector, 7)
    vector[999] = -0.0 if rank == 1 else 0.0  # equal as numbers, not as bits
    try:
        check_same_bits(vector, 8)
    except RunError as error:
        return str(error)


def test_a_differing_phi_is_found_and_its_rank_named(run_ranks):
    for message in run_ranks(2, compare_bits):
        assert message.startswith("step 8: phi on rank 1 differs from rank 0's")
