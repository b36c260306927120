"""Meta-training from all points of a grid at once, on the synthetic tasks of section 4.1.

The loop of dist_cts/meta_train.py with a batch of points for theta; the tests hold both together to 1e-10.
"""

import torch
from torch import Tensor

from dist_cts.learner import InnerConfig
from dist_cts.synthetic import METHODS, Environment, Trajectories


@torch.no_grad()
def meta_train_grid(
    env: Environment,
    starts: Tensor,
    algorithm: str,
    inner: InnerConfig,
    *,
    beta: float,
    M: int,
    K: int,
    reset_optimizer: bool = False,
) -> Tensor:
    """phi [1 + updates, G, 2]: `starts` [G, 2] and the position of each after every meta-update.

    `algorithm` is one of METHODS.
    """
    assert algorithm in METHODS, algorithm
    period = K if algorithm == "reptile" else 1
    trajectories = Trajectories(env, starts, inner)
    phi, path = starts, [starts]
    for _ in range(M):
        if reset_optimizer:
            _load_optimizer(trajectories, {})
        begin = _optimizer_state(trajectories)
        trajectories.start(phi)
        for k in range(1, K + 1):
            trajectories.step()
            if k % period == 0:
                delta = beta * (trajectories.theta - phi[:, None]).mean(1)
                phi = phi + delta
                path.append(phi)
                if algorithm == "cts":
                    trajectories.theta.add_(delta[:, None])
                elif algorithm == "accurate" and k < K:  # after the last step the reset would discard it
                    _load_optimizer(trajectories, begin)
                    trajectories.start(phi)
                    for _ in range(k):
                        trajectories.step()
    return torch.stack(path)


def _optimizer_state(trajectories: Trajectories) -> dict[str, Tensor]:
    state = trajectories.optimizer.state[trajectories.theta]
    return {key: value.clone() for key, value in state.items() if value is not None}


def _load_optimizer(trajectories: Trajectories, saved: dict[str, Tensor]) -> None:
    """Restores what `_optimizer_state` returned; buffers missing from `saved` start at zero."""
    for key, value in trajectories.optimizer.state[trajectories.theta].items():
        if value is not None:
            value.copy_(saved.get(key, torch.zeros_like(value)))
