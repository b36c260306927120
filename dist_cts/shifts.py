"""Shifts: what a meta-update of phi does to a task's trajectory."""

from torch import Tensor

from dist_cts.learner import TaskLearner


def none(learner: TaskLearner, delta: Tensor) -> None:
    """theta stays: the trajectory no longer starts at phi (the paper's No Shifting, section 4.2)."""


def continual(learner: TaskLearner, delta: Tensor) -> None:
    """theta <- theta + delta [N]: the whole trajectory moves with its start (paper, Eq. 1 and Algorithm 2, line 13)."""
    learner.theta.add_(delta)
