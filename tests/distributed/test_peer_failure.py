"""Lost peers: waiting for a GPU that never finishes, and the liveness check."""

import os
import signal
import threading

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dist_cts.distributed import peer_failure
from dist_cts.distributed.peer_failure import RESUME, LivenessCheck, liveness_checked, wait_for_gpu
from dist_cts.errors import RankError, RunError, on_all_ranks
from dist_cts.run.shutdown import stop_requests


class FakeEvent:
    """A CUDA event that happens at the n-th query; never without n."""

    def __init__(self, happens_at=None):
        self.queries, self.happens_at = 0, happens_at

    def query(self):
        self.queries += 1
        return self.queries == self.happens_at


def test_waiting_ends_when_the_event_has_happened():
    event = FakeEvent(happens_at=3)
    wait_for_gpu(event, 60, lambda: False)
    assert event.queries == 3


def test_waiting_ends_at_the_timeout():
    with pytest.raises(dist.DistBackendError, match="a collective has not finished after 0 s"):
        wait_for_gpu(FakeEvent(), 0.05, lambda: False)


def test_sigterm_is_handled_while_waiting_and_shortens_it(monkeypatch):
    monkeypatch.setattr(peer_failure, "STOP_SECONDS", 0.05)
    with stop_requests() as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(dist.DistBackendError):
            wait_for_gpu(FakeEvent(), 1e9, lambda: stop.made)
        assert stop.made


def wait_for_a_lost_rank(rank):
    """What rank 0 raises when its GPU waits for rank 1, which does not answer the liveness check."""
    peer_failure.ANSWER_SECONDS = 0.2
    error = None
    if rank == 0:
        try:
            with liveness_checked():
                wait_for_gpu(FakeEvent(), 0.05, lambda: False)
        except RunError as caught:
            error = caught
    dist.barrier()
    return str(error), getattr(error, "speaker", None)


def test_the_lost_rank_is_named_by_the_rank_that_waited(run_ranks):
    (text, speaker), _ = run_ranks(2, wait_for_a_lost_rank)
    assert text.startswith("rank 1 died or does not respond; run the same command to resume")
    assert speaker == 0


def fail_with_all_ranks_alive(rank):
    peer_failure.ANSWER_SECONDS, peer_failure.POLL_SECONDS = 20.0, 0.02
    try:
        with liveness_checked():
            dist.barrier()
            raise dist.DistBackendError("out of memory")
    except RunError as error:
        dist.barrier()
        return str(error)


def test_a_failure_without_a_lost_rank_says_so(run_ranks):
    for text in run_ranks(2, fail_with_all_ranks_alive):
        assert text.startswith("a collective failed although every rank is alive (out of memory); run the same")


ERRORS = {
    "value": ValueError("no such\nsample"),
    "key": KeyError("key"),
    "runtime": RuntimeError("shapes differ"),
    "own": RankError("a reason"),
    "memory": MemoryError(),
    "shared": on_all_ranks(ValueError("wrong everywhere")),
}


def fail_alone(rank, error, ranks):
    """What each rank raises: `error` on the first ranks; the others lose contact with them."""
    peer_failure.ANSWER_SECONDS, peer_failure.POLL_SECONDS = 20.0, 0.02
    try:
        with liveness_checked() as liveness:
            liveness.describe = lambda ranks: f"rank {ranks[0]}, in step 3,"
            if rank < ranks:
                raise ERRORS[error]
            _get_default_store().wait(["roll/verdict"])
            raise dist.DistBackendError("Connection closed by peer")
    except Exception as raised:
        return raised.args[0], getattr(raised, "speaker", None), getattr(raised, "unexpected", None)


@pytest.mark.parametrize(
    ("error", "text", "unexpected"),
    [
        ("value", f"rank 0, in step 3, failed: no such sample; {RESUME}", False),
        ("key", f"rank 0, in step 3, failed: KeyError: 'key'; {RESUME}", True),
        ("own", "rank 0: a reason", False),
        ("memory", "rank 0: out of memory (MemoryError); lower batch_size or use more ranks, ", False),
    ],
)
def test_of_an_error_on_one_rank_alone_that_rank_speaks(run_ranks, error, text, unexpected):
    (first, speaker, bug), (second, silent, _) = run_ranks(2, fail_alone, error, 1)
    assert first.startswith(text)
    assert (second, speaker, silent, bug) == (first, 0, 0, unexpected)


def test_of_errors_on_all_ranks_one_is_reported(run_ranks):
    first, second = run_ranks(2, fail_alone, "runtime", 2)
    assert first == second
    assert first[2]
    assert run_ranks(2, fail_alone, "shared", 2) == [("wrong everywhere", None, None)] * 2


def test_a_store_that_does_not_answer_bounds_the_liveness_check(monkeypatch):
    class CutOff:
        def compare_set(self, *_):
            threading.Event().wait()

    monkeypatch.setattr(peer_failure, "ANSWER_SECONDS", 0.02)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        liveness = LivenessCheck()
        liveness._store = CutOff()
        error = liveness.failure("timed out")
    finally:
        dist.destroy_process_group()
    assert isinstance(error, RankError)
    assert "the other ranks and torchrun's store are unreachable (timed out); run the same" in str(error)
