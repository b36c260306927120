"""When checkpoints are saved: every N steps, every N minutes, or both."""

import time

from pydantic import Field

from dist_cts.config import Config
from dist_cts.distributed.process_group import from_rank_0


class CheckpointConfig(Config):
    """When to save and what to keep. A run also saves when it finishes or is asked to stop."""

    every_steps: int = Field(1000, ge=0, description="save a checkpoint every N steps; 0 disables")
    every_minutes: float = Field(0.0, ge=0, description="save a checkpoint every N minutes; 0 disables")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="keep every N-step checkpoint permanently; 0 disables")
    give_up_minutes: float = Field(
        60.0, ge=0, description="abort if no checkpoint could be saved for N minutes (e.g. disk full); 0 never aborts"
    )


class Schedule:
    """Decides at which steps to save; every rank calls every method at the same step."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._saved_at, self._saved_step, self._next_look = time.monotonic(), 0, 0
        self._decision: tuple[int, bool] = (-1, False)  # the last step that `due` was called with, and its result

    def saved(self, step: int) -> None:
        """Notes that a save was tried after `step`."""
        self._saved_at, self._saved_step, self._next_look = time.monotonic(), step, step + 1

    def resumed(self, step: int) -> None:
        """Notes that the run starts after `step`."""
        self._saved_step = step

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`: the same answer on every rank and at every call."""
        if self._decision[0] != step:
            self._decision = step, self._decide(step)
        return self._decision[1]

    def _decide(self, step: int) -> bool:
        if any(period and step % period == 0 for period in (self.config.every_steps, self.config.keep_every)):
            return True
        if not self.config.every_minutes or step < self._next_look:
            return False
        # Rank 0's clock decides for all ranks. It is checked again halfway to the due time, at the speed so far.
        passed = time.monotonic() - self._saved_at
        left = 60 * self.config.every_minutes - passed
        ahead = int(left / 2 / passed * (step - self._saved_step))
        due, self._next_look = from_rank_0((left <= 0, step + max(1, ahead)))
        return due
