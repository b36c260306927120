"""Lost peers: finds out which ranks are dead or hang when a collective fails or never finishes.

gloo only reports that a connection closed or timed out, and ranks without a connection to the lost one notice nothing
until others exit. NCCL reports nothing: its collective never returns. So a thread on every rank polls the process
group's store, which torchrun's agent serves. The first rank whose collective fails starts a liveness check there and
reports the ranks that have not answered in time.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dist_cts.errors import RankError, RunError, UnreachableError, out_of_memory

T = TypeVar("T")
POLL_SECONDS = 0.5  # interval at which a rank polls the store
ANSWER_SECONDS = 4.0  # time for the ranks to answer the liveness check
# Wait for the GPU after SIGTERM: torchrun sends it when a peer has died, and SIGKILL 30 seconds later.
STOP_SECONDS = 5.0
RESUME = "run the same command to resume from the latest checkpoint"


def within(seconds: float, function: Callable[[], T]) -> T:
    """The function's result, or its error. For calls to the store, which no timeout of its own bounds.

    In a network partition such a call blocks until the kernel closes the connection, on Linux after 16 minutes.

    Raises:
        TimeoutError: the function has not returned after `seconds`; its thread is left behind.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)

    Thread(target=call, daemon=True).start()
    return outcome.result(seconds)


class LivenessCheck:
    """Asks all ranks through the process group's store whether they are alive; used once, when a run fails."""

    def __init__(self) -> None:
        self.describe: Callable[[list[int]], str] = lambda ranks: "rank " + ", ".join(map(str, ranks))
        self._rank, self._world_size, self._store = dist.get_rank(), dist.get_world_size(), _get_default_store()
        self._closed = Event()
        if self._world_size > 1:  # own connection: a blocked call occupies one
            Thread(target=self._answer, args=(self._store.clone(),), daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def failure(self, fault: str) -> RunError:
        """The error to raise after a collective failed with `fault`; the rank that started the check prints it.

        Takes ANSWER_SECONDS, at most four times that: when a rank exits, torchrun sends the others SIGTERM, which
        run/shutdown.py catches, and SIGKILL 30 seconds later.
        """
        try:
            rank, text = within(4 * ANSWER_SECONDS, self._call)
        except (RuntimeError, TimeoutError):
            return UnreachableError(f"the other ranks and torchrun's store are unreachable ({fault}); {RESUME}")
        return RunError(text or f"a collective failed although every rank is alive ({fault}); {RESUME}", speaker=rank)

    def own_failure(self, error: Exception) -> RunError:
        """The error to raise after `error` on this rank alone; the other ranks stay silent about having lost it.

        If another rank failed before, this one stays silent.
        """
        expected = isinstance(error, RankError | ValueError | OSError | ImportError)
        what = " ".join(str(error).split()) if expected else f"{type(error).__name__}: {error}".split("\n")[0]
        text = what if isinstance(error, RankError) else f"{self.describe([self._rank])} failed: {what}; {RESUME}"
        if short := out_of_memory(error):
            expected, text = True, f"rank {self._rank}: {short}"
        rank, call = self._rank, partial(self._call, text)
        with suppress(RuntimeError, TimeoutError):  # the others then report that they lost this rank
            # Not in a thread where memory has run out: Thread.start() would wait for ever if the thread cannot begin.
            rank, first = call() if short else within(4 * ANSWER_SECONDS, call)
            text = text if rank == self._rank else first
        return RunError(text, speaker=rank, unexpected=not expected)

    def _call(self, text: str | None = None) -> tuple[int, str]:
        """The rank that called first, and its text: its own failure, or what ranks are missing, if any."""
        caller = int(self._store.compare_set("roll/caller", "", str(self._rank)))
        if caller == self._rank and text is not None:
            self._store.set("roll/verdict", text)
        elif caller == self._rank:
            missing = [rank for rank in range(self._world_size) if rank != self._rank]
            deadline = time.monotonic() + ANSWER_SECONDS
            while missing and time.monotonic() < deadline:
                time.sleep(0.05)
                missing = [rank for rank in missing if not self._store.check([f"roll/{rank}"])]
            text = f"{self.describe(missing)} died or does not respond; {RESUME}" if missing else ""
            self._store.set("roll/verdict", text)
        self._store.wait(["roll/verdict"], timedelta(seconds=2 * ANSWER_SECONDS))
        return caller, self._store.get("roll/verdict").decode()

    def _answer(self, store: dist.Store) -> None:
        with suppress(RuntimeError):  # torchrun is gone: run/shutdown.py stops this rank
            while not self._closed.wait(POLL_SECONDS):
                if store.check(["roll/caller"]):
                    store.set(f"roll/{self._rank}", "here")
                    return


@contextmanager
def liveness_checked() -> Iterator[LivenessCheck]:
    """A block in which the loss of a rank becomes a one-line error, printed by one of the surviving ranks.

    Raises:
        RunError: replaces the error of gloo, NCCL or `wait_for_gpu` when a rank is lost, and, with several ranks, any
            error that is not raised on all ranks.
    """
    liveness = LivenessCheck()
    try:
        yield liveness
    except Exception as error:
        if isinstance(error, RunError) and not isinstance(error, RankError):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
            raise liveness.failure(text[:160]) from error
        if hasattr(error, "on_all_ranks") or dist.get_world_size() == 1:
            raise
        raise liveness.own_failure(error) from error
    finally:
        liveness.close()


def wait_for_gpu(event: torch.cuda.Event, timeout_seconds: float, stop_requested: Callable[[], bool]) -> None:
    """Returns once the GPU has reached `event`.

    Polls: `event.synchronize()` never returns if a peer of an NCCL collective is lost, and blocks signal handlers.

    Raises:
        DistBackendError: after `timeout_seconds`, or STOP_SECONDS if the rank was asked to stop.
    """
    started = time.monotonic()
    while not event.query():
        waited = time.monotonic() - started
        if waited > (min(STOP_SECONDS, timeout_seconds) if stop_requested() else timeout_seconds):
            raise dist.DistBackendError(f"NCCL: a collective has not finished after {waited:.0f} s")
        time.sleep(1e-4)
