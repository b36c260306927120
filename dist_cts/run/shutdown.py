"""What asks a rank to stop: SIGTERM, SIGUSR2, Ctrl-C, or the end of the torchrun that started it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Whether this rank has been asked to stop; the control tail then stops all of them at the same step."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def made(self) -> bool:
        """By a signal, or because the agent is dead: nobody would restart a run that goes on without it."""
        return self._since is not None or self._agent not in (None, os.getppid())

    def handle(self, number: int, frame: object) -> None:
        """A signal's handler; a second Ctrl-C ends the process, but a terminal's reaches a rank twice through torchrun.

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
    """A block in which SIGTERM, SIGUSR2 and Ctrl-C are requests, but only in the main thread."""
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
