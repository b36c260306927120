"""The outer rule: beta over the episodes, and momentum of the meta-updates."""

from pydantic import Field, model_validator
from torch import Tensor

from dist_cts.config import Config
from dist_cts.schedules import DECAY_HELP, Decay, decay


class OuterConfig(Config):
    """What happens to a meta-update before phi takes it; the paper's is plain, with a constant beta."""

    momentum: float = Field(0, ge=0, lt=1, description="mu, momentum of the meta-updates; 0: none")
    nesterov: bool = Field(False, description="Nesterov momentum instead of heavy ball")
    schedule: Decay = Field("constant", description=f"beta over the M episodes: {DECAY_HELP}")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "OuterConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("outer.nesterov=true needs outer.momentum above 0")
        return self


PLAIN = OuterConfig()


def beta_at(m: int, M: int, beta: float, outer: OuterConfig) -> float:
    """beta of episode m, 1 .. M: the full beta in the first one, and above 0 in the last."""
    return beta * decay(outer.schedule, (m - 1) / M)


def accelerate(delta: Tensor, velocity: Tensor | None, outer: OuterConfig) -> Tensor:
    """What phi and every theta move by [N], from the meta-update delta [N]; may overwrite or share both arguments.

    Heavy ball: v <- mu v + delta, and the move is v; Nesterov: it is delta + mu v. Without a velocity it is delta.
    """
    if velocity is None:
        return delta
    velocity.mul_(outer.momentum).add_(delta)
    return delta.add_(velocity, alpha=outer.momentum) if outer.nesterov else velocity
