"""The errors that end a run: on all ranks alike, or on one rank alone."""

import os


class RunError(RuntimeError):
    """The run failed; every rank raises this with the same text, and rank `speaker` prints it."""

    def __init__(self, text: str, speaker: int = 0) -> None:
        super().__init__(text)
        self.speaker = speaker


class RankError(RunError):
    """The run failed on this rank alone; the others then lose contact with it."""

    def __init__(self, text: str) -> None:
        rank = int(os.environ.get("RANK", 0))
        super().__init__(f"rank {rank}: {text}", speaker=rank)
