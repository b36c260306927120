"""The errors that end a run on purpose: on all ranks alike, or on one rank alone."""

import os


class RunError(RuntimeError):
    """A run that cannot go on; every rank raises it, with the same text, and rank `speaker` prints it."""

    def __init__(self, text: str, speaker: int = 0) -> None:
        super().__init__(text)
        self.speaker = speaker


class RankError(RunError):
    """What ends the run on one rank alone; the others then lose contact with it."""

    def __init__(self, text: str) -> None:
        rank = int(os.environ.get("RANK", 0))
        super().__init__(f"rank {rank}: {text}", speaker=rank)
