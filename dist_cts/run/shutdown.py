"""Graceful shutdown on SIGTERM, SIGUSR2, Ctrl-C or loss of torchrun."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Whether this rank was asked to stop; the control tail then stops all ranks at the same step."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def made(self) -> bool:
        """By a signal, or because torchrun's agent is gone and could not restart the run."""
        return self._since is not None or self._agent not in (None, os.getppid())

    def handle(self, number: int, frame: object) -> None:
        """Signal handler. A second Ctrl-C exits immediately.

        One Ctrl-C in a terminal may arrive twice, directly and through torchrun, so a second one counts only after more
        than a second.

        Raises:
            KeyboardInterrupt: Ctrl-C more than a second after the first signal.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif number == signal.SIGINT and now - self._since > 1:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A block in which SIGTERM, SIGUSR2 and Ctrl-C request a stop; no effect outside the main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
