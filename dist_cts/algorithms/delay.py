"""How long a delay of the meta-update may be: on quadratics, continual trajectory shifting is a recurrence."""

from collections import deque

import numpy as np

from dist_cts.learner import InnerConfig

GROWTH = 4.0  # harmless in benchmarks/delay_quality.py: 3.1; harmful: 5.1
CURVATURES = np.logspace(-4, 0, 40)  # alpha h / (1 - momentum)
HORIZON = 1000  # inner steps after which the recurrence stops: what grows has grown by then


def episode_growth(inner: InnerConfig, beta: float, K: int, *, delay: int, period: int = 1) -> float:
    """The largest |phi_K - c| / |phi_0 - c| after an episode on one task with the loss h/2 (theta - c)^2, over h.

    At most 1 if the meta-updates are stable; docs/paper.md has the condition for many steps. Weight decay is left out.
    """
    mu, nesterov, steps = inner.momentum, inner.optimizer == "nesterov", min(K, HORIZON)
    curvature = CURVATURES * (1 - mu)
    phi, velocity, late = np.ones_like(curvature), np.zeros_like(curvature), deque[tuple[int, np.ndarray]]()
    theta = phi.copy()
    for k in range(1, steps + 1):
        gradient = curvature * theta
        velocity = mu * velocity + gradient
        theta = theta - (gradient + mu * velocity if nesterov else velocity)
        if k % period == 0:
            late.append((k, beta * (theta - phi)))
        while late and (late[0][0] + delay <= k or k == steps):
            _, delta = late.popleft()
            phi, theta = phi + delta, theta + delta
    return float(np.abs(phi).max())


def delay_warning(inner: InnerConfig, beta: float, K: int, *, delay: int, period: int = 1) -> str | None:
    """A warning before the run if the delay is too long for beta, momentum and K; None otherwise, and for Adam."""
    if not delay or inner.optimizer not in ("sgd", "nesterov"):
        return None
    growth = episode_growth(inner, beta, K, delay=delay, period=period)
    if growth <= GROWTH:
        return None
    return (
        f"warning: method.delay={delay} is long for this meta_lr, momentum and K: on a quadratic, phi moves away from "
        f"the optimum, {growth:.3g} times per episode; lower the delay or meta_lr"
    )
