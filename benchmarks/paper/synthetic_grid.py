"""Meta-training from all points of a grid at once, on the synthetic tasks of section 4.1.

The loop of dist_cts/meta_train.py with a batch of points for theta; a test compares both to 1e-10.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dist_cts.learner import InnerConfig, make_optimizer
from dist_cts.synthetic import METHODS, TEST, TEST_STEPS, Environment, constants, losses


class Trajectories:
    """theta [G, T, 2] of all tasks from all initializations, updated by one elementwise inner optimizer."""

    def __init__(self, env: Environment, phi: Tensor, inner: InnerConfig) -> None:
        self.env = env
        # x and y are separate planes in memory, so that operations on either one are contiguous.
        planes = phi.T[:, :, None].repeat(1, 1, env.tasks)  # [2, G, T]
        self.theta = nn.Parameter(planes.permute(1, 2, 0))
        self.optimizer = make_optimizer([self.theta], inner)

    @torch.no_grad()
    def step(self) -> None:
        """One inner step of every theta."""
        self.theta.grad = gradients(self.env, self.theta)
        self.optimizer.step()

    def start(self, phi: Tensor) -> None:
        """Sets every task's theta to `phi` [G, 2]; the optimizer keeps its state."""
        self.theta.copy_(phi[:, None].expand_as(self.theta))


def adapt(env: Environment, phi: Tensor, inner: InnerConfig = TEST, steps: int = TEST_STEPS) -> Iterator[Tensor]:
    """theta [G, T, 2] after each of `steps` inner steps from `phi` [G, 2]; every step overwrites the same tensor."""
    trajectory = Trajectories(env, phi, inner)
    for _ in range(steps):
        trajectory.step()
        yield trajectory.theta.detach()


def grid_quality(env: Environment, phi: Tensor, inner: InnerConfig = TEST, steps: int = TEST_STEPS) -> Tensor:
    """Task-average loss [G] after `steps` steps from `phi` [G, 2]; nan or inf where they diverge (Figures 4c, 5c)."""
    *_, theta = adapt(env, phi, inner, steps)
    return losses(env, theta).mean(1)


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
    delay: int = 0,
    crossing: bool = False,
) -> Tensor:
    """phi [1 + updates, G, 2]: `starts` [G, 2] and the position of each after every meta-update.

    `algorithm` is one of METHODS. With `crossing`, meta-updates in flight at the end of an episode are applied in the
    next one, not before it.
    """
    assert algorithm in METHODS, algorithm
    period = K if algorithm == "reptile" else 1
    trajectories = Trajectories(env, starts, inner)
    phi, path, late = starts, [starts], deque[tuple[int, Tensor]]()
    for m in range(M):
        if reset_optimizer:
            _load_optimizer(trajectories, {})
        begin = _optimizer_state(trajectories)
        trajectories.start(phi)
        for k in range(1, K + 1):
            trajectories.step()
            if k % period == 0:
                late.append((m * K + k, beta * (trajectories.theta - phi[:, None]).mean(1)))
            flush = k == K and (not crossing or m == M - 1)
            while late and (flush or late[0][0] + delay <= m * K + k):
                _, delta = late.popleft()
                phi = phi + delta
                path.append(phi)
                if algorithm == "cts":
                    trajectories.theta.add_(delta[:, None])
                elif algorithm == "accurate" and k < K:  # not after the last step: the reset would discard it
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


def gradients(env: Environment, points: Tensor) -> Tensor:
    """The gradients [..., T, 2] of `losses` at `points` [..., T, 2] in closed form, in the points' memory layout."""
    centers_x, centers_y, cos, sin = constants(env)
    x, y = points[..., 0] - centers_x, points[..., 1] - centers_y
    u, v = cos * x - sin * y, sin * x + cos * y
    a = (u * u + v).sub_(11).mul_(2 * env.coeff[0])
    b = (v * v + u).sub_(7).mul_(2 * env.coeff[1])
    du, dv = (2 * a).mul_(u).add_(b), (2 * b).mul_(v).add_(a)
    gradient = torch.empty_like(points)
    torch.add(cos * du, sin * dv, out=gradient[..., 0])
    torch.sub(cos * dv, sin * du, out=gradient[..., 1])
    return gradient
