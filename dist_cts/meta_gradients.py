"""Meta-gradients: what a task asks of phi, a vector [N] for the reducer to average.

Each writes into the memory of the learner's spent gradient, which the next inner step clears.
"""

import torch
from torch import Tensor

from dist_cts.learner import TaskLearner


def reptile(learner: TaskLearner, phi: Tensor) -> Tensor:
    """phi - theta_k [N], the Reptile difference (Nichol et al., 2018; paper section 3.1)."""
    return torch.sub(phi, learner.theta, out=learner.flat.grad[: phi.numel()])
