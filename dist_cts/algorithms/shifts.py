"""Shifts: how a task's trajectory follows a meta-update of phi.

Each takes the learner, the new phi [N], the meta-update delta [N] and the progress of the run.
"""

import torch
from torch import Tensor

from dist_cts.learner import TaskLearner
from dist_cts.progress import Progress
from dist_cts.seeds import hashed_seed


def none(learner: TaskLearner, phi: Tensor, delta: Tensor, progress: Progress) -> None:
    """theta is unchanged: the trajectory no longer starts at phi (the paper's No Shifting, section 4.2)."""


def continual(learner: TaskLearner, phi: Tensor, delta: Tensor, progress: Progress, scale: float = 1.0) -> None:
    """theta <- theta + delta: the trajectory moves with its initialization (paper, Eq. 1 and Algorithm 2, line 13).

    `scale` is for meta-gradients whose norm differs from Reptile's; the released code uses 0.3 for FOMAML.
    """
    learner.theta.add_(delta, alpha=scale)


def random(
    learner: TaskLearner, phi: Tensor, delta: Tensor, progress: Progress, seed: int = 0, scale: float = 1.0
) -> None:
    """theta moves as far as with `continual`, in a random direction (the paper's Random Shifting, section 4.2).

    The direction depends only on (seed, step): the same for all learners, and on all ranks with the same device type.
    """
    generator = torch.Generator(delta.device).manual_seed(hashed_seed(seed, "random_shifting", progress.step))
    direction = torch.zeros_like(delta)
    for view in learner.flat.body_layout.views(direction).values():  # padding between tensors stays zero
        view.normal_(generator=generator)
    learner.theta.add_(direction * (delta.norm() / direction.norm()), alpha=scale)


def begin_exact(learner: TaskLearner) -> None:
    """Stores what an episode starts from: head, optimizer state and running statistics."""
    learner.memory = {f"start.{name}": value.clone() for name, value in learner.state_dict().items()}


def exact(learner: TaskLearner, phi: Tensor, delta: Tensor, progress: Progress) -> None:
    """theta <- U_k(phi): replays the episode's k batches from the new phi (the paper's Ours Accurate, section 4.1).

    The next inner step makes it U_(k+1)(phi), so inner step k costs k gradient evaluations. The last step of an episode
    replays nothing, because the reset would discard it.
    """
    if not progress.at_episode_start:
        replay_from(learner, phi, progress)


def replay_from(learner: TaskLearner, phi: Tensor, progress: Progress) -> None:
    """theta <- U_k(phi), from what `begin_exact` stored, with the batches of the episode's k steps so far."""
    start = {name.removeprefix("start."): value for name, value in learner.memory.items()}
    learner.load_state_dict(start)
    learner.theta.copy_(phi)
    k = progress.inner_step
    learner.replay(progress.step - k, k)


def rejoin(learner: TaskLearner, phi: Tensor, delta: Tensor, progress: Progress) -> None:
    """theta <- phi: all learners continue from the same body, as in joint training."""
    learner.theta.copy_(phi)
