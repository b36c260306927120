"""Which ranks are gone, when a collective fails.

gloo only tells that a connection is closed or silent, and a rank far from the lost one notices nothing until others
leave. So a thread of every rank looks into the process group's store, which torchrun's agent holds: whoever meets a
failure first calls the roll there, waits, and names the ranks whose threads have not answered.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dist_cts.errors import RankError, RunError

LOOK = 0.5  # seconds between two looks of a rank's thread into the store
PATIENCE = 4.0  # seconds that the living have to answer
GO_ON = "the same command goes on from the newest checkpoint"


class LivenessCheck:
    """The ranks of the process group, in a store that all of them reach; it is called once, for then the run ends."""

    def __init__(self) -> None:
        self.describe: Callable[[list[int]], str] = lambda ranks: "rank " + ", ".join(map(str, ranks))
        self._rank, self._world_size, self._store = dist.get_rank(), dist.get_world_size(), _get_default_store()
        self._over = Event()
        if self._world_size > 1:  # its own connection: another thread's would be busy while that one waits
            Thread(target=self._answer, args=(self._store.clone(),), daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()

    def failure(self, fault: str) -> RunError:
        """What to raise where a collective failed with `fault`; the rank that calls the roll is the one to print it.

        Takes PATIENCE seconds: torchrun, once it sees a rank's end, sends the others SIGTERM and leaves them 30 seconds
        (SIGTERM must not end them here: stop_request.py still holds it).
        """
        try:
            caller, text = self._call()
        except RuntimeError:  # no answer from the store itself
            return RankError(f"the other ranks and the store of torchrun are out of reach ({fault})")
        return RunError(text or f"the ranks lost each other, though all of them live ({fault})", speaker=caller)

    def _call(self) -> tuple[int, str]:
        """The calling rank, and its line about those that are missing; empty if none is."""
        caller = int(self._store.compare_set("roll/caller", "", str(self._rank)))
        if caller == self._rank:
            missing = [rank for rank in range(self._world_size) if rank != self._rank]
            deadline = time.monotonic() + PATIENCE
            while missing and time.monotonic() < deadline:
                time.sleep(0.05)
                missing = [rank for rank in missing if not self._store.check([f"roll/{rank}"])]
            text = f"{self.describe(missing)} is gone or does not answer; {GO_ON}" if missing else ""
            self._store.set("roll/verdict", text)
        self._store.wait(["roll/verdict"], timedelta(seconds=2 * PATIENCE))
        return caller, self._store.get("roll/verdict").decode()

    def _answer(self, store: dist.Store) -> None:
        with suppress(RuntimeError):  # the store has gone, and torchrun with it: see stop_request.py
            while not self._over.wait(LOOK):
                if store.check(["roll/caller"]):
                    store.set(f"roll/{self._rank}", "here")
                    return


@contextmanager
def liveness_checked() -> Iterator[LivenessCheck]:
    """A block in which the loss of a rank becomes one line, printed by one of those left.

    Raises:
        RunError: what gloo and NCCL raise when a rank is gone, turned into that line.
    """
    liveness = LivenessCheck()
    try:
        yield liveness
    except RunError:
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "gloo" not in text:
            raise
        raise liveness.failure(text[:160]) from error
    finally:
        liveness.close()
