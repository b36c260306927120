"""How a learning rate falls over a run or an episode."""

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]
DECAY_HELP = "constant; linear or cosine: falls to 0"


def decay(name: Decay, progress: float) -> float:
    """The factor on a learning rate when a share `progress`, 0 .. 1, of the steps is done."""
    if name == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2 if name == "cosine" else 1.0
