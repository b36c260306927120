"""The inner optimizer, and its learning rate over an episode or a meta-test."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_cts.config import Config
from dist_cts.schedules import DECAY_HELP, Decay, decay


class InnerConfig(Config):
    """The inner optimizer; the defaults are the paper's image classification (section 4.2)."""

    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = Field("sgd", description="sgd, nesterov, adam or adamw")
    lr: float = Field(0.01, gt=0, description="alpha, inner learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and nesterov; beta_1 of adam and adamw")
    weight_decay: float = Field(5e-4, ge=0, description="L2 decay of body and head; adamw: decoupled decay")
    freeze_body: bool = Field(False, description="inner steps train the head alone (ANIL); for fomaml's meta-gradients")
    clip: float = Field(0, ge=0, description="largest norm of a task's gradient, body and head together; 0: no limit")
    schedule: Decay = Field("constant", description=f"lr over the K steps of an episode: {DECAY_HELP}")
    warmup: int = Field(0, ge=0, description="the first steps of each episode, during which lr rises linearly")


def make_optimizer(parameters: list[nn.Parameter], config: InnerConfig) -> torch.optim.Optimizer:
    """The inner optimizer; on a flat parameter its update is one fused kernel.

    Raises:
        ValueError: nesterov without momentum.
    """
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(
            parameters,
            lr=config.lr,
            betas=(config.momentum, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
            capturable=parameters[0].is_cuda,  # a CUDA graph may record the update
        )
    nesterov = config.optimizer == "nesterov"
    if nesterov and config.momentum == 0:
        raise ValueError("inner.momentum=0: inner.optimizer=nesterov needs a momentum above 0, or use sgd")
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=nesterov,
        fused=True,
    )


def update(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, config: InnerConfig, body: Tensor) -> None:
    """An inner step from `parameter.grad` [..., N + H]: clipping, optimizer, and the frozen body [..., N] put back."""
    if config.clip:
        # As clip_grad_norm_, per row; the host reads no value.
        norms = parameter.grad.norm(dim=-1, keepdim=True)
        parameter.grad.mul_((config.clip / (norms + 1e-6)).clamp(max=1))
    kept = body.clone() if config.freeze_body else None
    optimizer.step()
    if kept is not None:
        body.copy_(kept)


def inner_schedule(config: InnerConfig, K: int) -> Callable[[int], float] | None:
    """The factor on alpha at a global inner step s, in episodes of K steps; None where it is always 1."""
    if config.schedule == "constant" and config.warmup == 0:
        return None

    def factor(step: int) -> float:
        k = step % K
        if k < config.warmup:
            return (k + 1) / (config.warmup + 1)
        return decay(config.schedule, (k - config.warmup) / (K - config.warmup))

    return factor


def make_schedule(
    optimizer: torch.optim.Optimizer, name: str, steps: int, factor: float = 0.2
) -> torch.optim.lr_scheduler.LRScheduler:
    """The meta-test's learning rate over `steps`: multi-step (x `factor` at 40, 70, 90 %), cosine or constant."""
    if name == "multi-step":
        milestones = [round(steps * share) for share in (0.4, 0.7, 0.9)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=factor)
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
