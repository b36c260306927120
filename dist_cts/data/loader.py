"""Loads batches of a map-style PyTorch dataset by a DataLoader with workers, ahead of the step that needs them."""

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from pickle import PicklingError
from threading import Thread

import torch
from torch.utils import data

from dist_cts.data.samples import IDLE, Batch, Failure, Row, Samples, one_line
from dist_cts.errors import RankError

STALLED = 300.0  # seconds without a batch after which the workers count as stuck
POLL = 2.0  # seconds after which a waiting rank checks that its workers live
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}  # torchrun sends them to a rank's workers, too


class Loader:
    """The batches of `rows`, in their order, on the host; pinned if `device` is a GPU.

    Args:
        name: the task, and its split unless that is train; begins every error message.
        keys: what the seed of a sample depends on besides its position.
        workers: processes that load. They start at the first `take` and end with `close`, or with this process.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        rows: Iterator[Row],
        *,
        name: str,
        keys: tuple[int | str, ...],
        workers: int,
        device: torch.device,
    ) -> None:
        self.name, self.workers, self.device = name, workers, device
        self._dataset, self._keys, self._rows = dataset, keys, rows
        self._ahead: deque[Row] = deque()  # rows that the DataLoader has drawn and not yet returned
        self._stale = 0  # how many of them were drawn before the last `restart`
        self._iterator: Iterator[Batch | Failure] | None = None

    def take(self) -> Batch:
        """The batch of the next row.

        Raises:
            RankError: a sample cannot be loaded, or a worker died or is stuck (names task, step and sample), or the
                dataset cannot be sent to worker processes.
        """
        if self._iterator is None:
            self._iterator = self._start()
        while self._stale:
            self._receive()
            self._stale -= 1
        row, batch = self._receive()
        if isinstance(batch, Failure):
            raise self._error(row.step, batch.sample, batch.text)
        return batch

    def restart(self, rows: Iterator[Row]) -> None:
        """Continues with `rows`. The workers stay; what they have loaded ahead is dropped."""
        self._rows, self._stale = rows, len(self._ahead)

    def close(self) -> None:
        """Ends the workers; before another `take`, call `restart`."""
        workers = self._processes()
        self._iterator, self._stale = None, 0  # the DataLoader asks them to exit and waits for some seconds
        self._ahead.clear()
        for worker in workers:
            worker.kill()  # if it is stuck

    def _start(self) -> Iterator[Batch | Failure]:
        context = _context() if self.workers else None
        # Step and sample at which each worker is.
        self._places = context.RawArray("q", 2 * self.workers) if context else [0, 0]
        try:
            with _stop_signals_blocked(), warnings.catch_warnings(action="ignore"):  # of more workers than cores
                return iter(
                    data.DataLoader(
                        Samples(self._dataset, self._keys, self._places),
                        batch_size=None,
                        sampler=self._draw(),
                        collate_fn=_unchanged,
                        num_workers=self.workers,
                        multiprocessing_context=context,
                        worker_init_fn=_begin_worker,
                        timeout=POLL if context else 0,
                        pin_memory=self.device.type == "cuda",
                        generator=torch.Generator(),  # or it draws from the global one
                    )
                )
        except (TypeError, AttributeError, PicklingError) as error:
            raise RankError(
                f"task {self.name}: its dataset cannot be sent to worker processes ({one_line(error)}); define it at "
                "the top level of a module, or set data.dataset_workers=0"
            ) from None

    def _draw(self) -> Iterator[Row]:
        while (row := next(self._rows, None)) is not None:
            self._ahead.append(row)
            yield row

    def _receive(self) -> tuple[Row, Batch | Failure]:
        deadline = time.monotonic() + STALLED
        while True:
            try:
                batch = next(self._iterator)
                return self._ahead.popleft(), batch
            except (RuntimeError, OSError, EOFError) as error:  # the DataLoader's own; a dataset's become a Failure
                self._check_workers(error, late=time.monotonic() > deadline)

    def _check_workers(self, error: Exception, late: bool) -> None:
        """Raises RankError unless `error` only says that no batch has arrived within POLL seconds."""
        workers, timed_out = self._processes(), "timed out" in str(error)
        # A broken connection to a worker shows a little earlier than the worker's end.
        connection.wait([worker.sentinel for worker in workers], timeout=0 if timed_out else POLL)
        for number, worker in enumerate(workers):
            if not worker.is_alive():
                raise self._error(*self._place(number), f"worker process {worker.pid} {_describe_exit(worker)}")
        if not timed_out:
            raise self._error(self._ahead[0].step, IDLE, one_line(error)) from error
        if late:
            for worker in workers:
                worker.kill()
            number = next((n for n in range(len(workers)) if self._place(n)[0] == self._ahead[0].step), 0)
            raise self._error(*self._place(number), f"no batch for {STALLED:.0f} s; its workers are stuck")

    def _place(self, worker: int) -> tuple[int, int]:
        step, sample = self._places[2 * worker : 2 * worker + 2]
        return step, sample

    def _processes(self) -> list[multiprocessing.Process]:
        return getattr(self._iterator, "_workers", [])  # the DataLoader's iterator has no public name for them

    def _error(self, step: int, sample: int, text: str) -> RankError:
        at = "" if sample == IDLE else f", sample {sample}"
        return RankError(f"task {self.name}, step {step}{at}: {text}")


def _unchanged(batch: Batch | Failure) -> Batch | Failure:
    return batch


def _context() -> multiprocessing.context.ForkServerContext:
    """Workers come from a server process that has torch loaded and no threads.

    A forked worker would inherit the rank's sockets and its lock on the run folder: after the rank's death, neither its
    peers nor a resumed run could go on. A spawned one would import torch itself, for seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # no effect if the server runs already
    return context


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """A block whose new processes, the server included, never see the signals that ask a rank to stop.

    The rank then still needs them for its last steps.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_: int) -> None:
    """Runs first in every worker: it ends with its rank, also if the rank is killed, and on no signal before.

    The DataLoader's own check looks at the parent process, which is the server, and the server lives as long as any
    worker.
    """
    for number in STOP_SIGNALS:  # handled, not ignored or blocked: that would pass to processes that the dataset starts
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def end() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=end, daemon=True).start()


def _describe_exit(worker: multiprocessing.Process) -> str:
    code = worker.exitcode or 0
    if code >= 0:
        return f"exited with code {code}; its error is above"
    name = signal.Signals(-code).name
    hint = {"SIGKILL": "; is the machine out of memory?", "SIGBUS": "; is /dev/shm full?"}.get(name, "")
    return f"was killed by {name}{hint}"
