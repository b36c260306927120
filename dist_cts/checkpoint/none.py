"""No checkpoints: for a run without a folder, from a script."""

from collections.abc import Sequence

from dist_cts.config import Config
from dist_cts.state import TrainState


class NoCheckpoints:
    """In place of a CheckpointManager: a run without a folder."""

    folder = None

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def save(self, state: TrainState, config: Config, wait: bool = False) -> bool:
        """Saves nothing."""
        return False

    def load_newest(self, state: TrainState, config: Config, may_differ: Sequence[str] = ()) -> None:
        """Finds none."""
