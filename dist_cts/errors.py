"""The errors that end a run, on all ranks alike or on one rank alone, and warnings about failures that do not."""

import os
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

E = TypeVar("E", bound=Exception)


class RunError(RuntimeError):
    """The run failed; every rank raises this with the same text, and rank `speaker` prints it.

    `unexpected`: its cause is an error in some code, so that the speaker prints the cause's traceback, too.
    """

    def __init__(self, text: str, speaker: int = 0, unexpected: bool = False) -> None:
        super().__init__(text)
        self.speaker, self.unexpected = speaker, unexpected


class RankError(RunError):
    """The run failed on this rank alone; the others then lose contact with it."""

    def __init__(self, text: str) -> None:
        rank = int(os.environ.get("RANK", 0))
        super().__init__(f"rank {rank}: {text}", speaker=rank)


class UnreachableError(RankError):
    """This rank reaches neither the other ranks nor torchrun's store, e.g. in a network partition."""


def on_all_ranks(error: E) -> E:
    """Marks an error as one that every rank raises alike; it is reported as it is, by rank 0."""
    error.on_all_ranks = True
    return error


def out_of_memory(error: Exception) -> str:
    """What to say if an allocation failed, in Python, in torch on the CPU or on a GPU; otherwise empty."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(
        words in text.lower() for words in ("out of memory", "allocate memory")
    ):
        return ""
    first = text.splitlines()[0] if text else "MemoryError"
    return f"out of memory ({first}); lower batch_size or use more ranks, then run the same command to resume"


def cause_of(error: Exception) -> str:
    """Why a write failed, without the file's name: the same text for every file and step."""
    return getattr(error, "strerror", None) or str(error)


class RepeatedWarning:
    """Warns at the 1st, 10th, 100th, ... occurrence of each cause, with the count."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn, self._counts = warn, Counter[str]()

    def __call__(self, cause: str, details: str, prefix: str = "") -> None:
        """Counts an occurrence of `cause`; the line is prefix, cause and details."""
        self._counts[cause] += 1
        count = self._counts[cause]
        if str(count).strip("0") == "1":
            times = f" ({count} times so far)" if count > 1 else ""
            self._warn(f"{prefix}{cause}{times}{details}")
