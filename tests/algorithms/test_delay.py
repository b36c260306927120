"""Delayed shifting on quadratics: what docs/paper.md derives, on the real loop and on its recurrence."""

import numpy as np
import pytest
import torch

from dist_cts.algorithms.delay import delay_warning, episode_growth
from dist_cts.algorithms.table import ALGORITHMS, MethodConfig
from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import process_group
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.learner import InnerConfig
from dist_cts.meta_train import meta_train
from dist_cts.progress import Progress
from dist_cts.state import TrainState
from tests.helpers.quadratic import make_learner, phi_of

A, C = torch.tensor([0.2, 1.0, 4.0]), torch.tensor([1.0, -2.0, 0.5])
MOMENTUM = InnerConfig(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0)


def sgd(momentum=0.0, optimizer="sgd"):
    return InnerConfig(optimizer=optimizer, lr=0.1, momentum=momentum, weight_decay=0)


def recurrence(h, beta, K, delay, alpha=1.0, momentum=0.0, nesterov=False):
    """phi - c and theta - c [K + 1] within an endless episode from phi - c = 1, by the rule as it is written."""
    phi, theta, velocity = np.ones(K + 1), np.ones(K + 1), 0.0
    difference = np.zeros(K + 1)
    for k in range(1, K + 1):
        gradient = h * theta[k - 1]
        velocity = momentum * velocity + gradient
        theta[k] = theta[k - 1] - alpha * (gradient + momentum * velocity if nesterov else velocity)
        phi[k] = phi[k - 1]
        difference[k] = phi[k] - theta[k]  # of this step, before its shift
        if k > delay:
            delta = -beta * difference[k - delay]
            phi[k], theta[k] = phi[k] + delta, theta[k] + delta
    return phi, theta


def test_phi_minus_theta_is_changed_by_inner_steps_alone_and_phi_follows_the_recurrence():
    K, delay, beta = 12, 3, 0.3
    with process_group(torch.device("cpu"), 30):
        learner = make_learner([(C, A)], inner=sgd())
        phi, progress, seen = phi_of(learner, torch.zeros(3)), Progress(K), []
        reducer = MetaReducer(phi, [learner], place(1, 1, 0), delay=delay)
        state = TrainState(phi, learner.flat.body_layout, [learner], progress)

        def after_step():
            seen.append((phi[:3].clone(), learner.theta[:3].clone()))

        meta_train(state, ALGORITHMS["cts"], reducer, beta=beta, M=1, K=K, after_step=after_step)
    before = torch.zeros(3), torch.zeros(3)
    for now in seen:
        gradient = A * (before[1] - C)
        torch.testing.assert_close(now[0] - now[1], before[0] - before[1] + 0.1 * gradient)
        before = now
    for axis, (h, c) in enumerate(zip(A.tolist(), C.tolist(), strict=True)):
        expected, _ = recurrence(h, beta, K - 1, delay, alpha=0.1)
        got = [1 - phi[axis].item() / c for phi, _ in seen[: K - 1]]  # at k = K all deltas have arrived
        np.testing.assert_allclose(got, expected[1:], atol=1e-5)


def slope(measure, name, setting):
    """The exponent of `measure` in one of the setting's values."""
    twice = setting | {name: 2 * setting[name]}
    return np.log2(measure(**twice) / measure(**setting))


def moved(h, beta, K, delay):
    """How far phi of the delayed run is from that of the undelayed one, all meta-updates applied."""
    (late, late_theta), (phi, theta) = recurrence(h, beta, K, delay), recurrence(h, beta, K, 0)
    # Without shifts, phi would be 1 - beta * sum of phi_k - theta_k, which shifts do not change.
    return abs(beta * ((late - late_theta) - (phi - theta)).sum())


def error(h, beta, K, delay):
    """What the delay adds to the distance between theta_K and the exact trajectory from phi_K."""
    (late, late_theta), (phi, theta) = recurrence(h, beta, K, delay), recurrence(h, beta, K, 0)
    contraction = (1 - h) ** K
    return abs((late_theta[-1] - contraction * late[-1]) - (theta[-1] - contraction * phi[-1]))


def test_the_orders_of_what_the_delay_changes():
    setting = {"h": 1e-5, "beta": 1e-4, "K": 400, "delay": 4}
    for name, order in {"beta": 2, "h": 2, "delay": 1, "K": 3}.items():
        assert slope(moved, name, setting) == pytest.approx(order, abs=0.1), name
    for name, order in {"beta": 1, "h": 2, "delay": 1, "K": 2}.items():
        assert slope(error, name, setting) == pytest.approx(order, abs=0.1), name


def radius(h, beta, momentum, delay, nesterov):
    """The largest root of (z - 1)(z - 1 + G) + beta G z^(1 - d), with G = alpha h z / (z - mu) for momentum SGD."""
    z = np.poly1d([1, 0])
    gain = np.poly1d([h * (1 + momentum), -h * momentum] if nesterov else [h, 0])
    free = (z - 1) * ((z - 1) * (z - momentum) + gain)
    return np.abs((free * z ** (delay - 1) + beta * gain).roots).max()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("delay", [1, 2, 5])
def test_a_flat_quadratic_is_stable_below_the_limit_and_unstable_above_it(momentum, nesterov, delay):
    lag = momentum ** (1 + nesterov) / (1 - momentum)
    limit = 1 / (delay + lag)
    h = 1e-4 * (1 - momentum)
    assert radius(h, 0.97 * limit, momentum, delay, nesterov) < 1
    assert radius(h, 1.03 * limit, momentum, delay, nesterov) > 1
    inner = sgd(momentum, "nesterov" if nesterov else "sgd")
    assert episode_growth(inner, 0.8 * limit, 1000, delay=delay) <= 1.01
    assert episode_growth(inner, 2 * limit, 1000, delay=delay) > 2


def test_rarer_meta_updates_bear_a_longer_delay():
    assert episode_growth(sgd(0.9), 0.3, 100, delay=5, period=5) < episode_growth(sgd(0.9), 0.3, 100, delay=5) / 10


def test_too_long_a_delay_is_warned_about_in_one_line():
    assert delay_warning(MOMENTUM, 0.1, 100, delay=8) is None
    assert delay_warning(MOMENTUM, 0.03, 1000, delay=16) is None
    assert delay_warning(InnerConfig(optimizer="adam"), 1, 100, delay=50) is None
    assert delay_warning(MOMENTUM, 1, 100, delay=0) is None  # today's runs keep their lines
    text = delay_warning(MOMENTUM, 0.1, 100, delay=16)
    assert text.startswith("warning: method.delay=16 is long for this meta_lr, momentum and K: ")
    assert "\n" not in text
    assert delay_warning(MOMENTUM, 0.1, 1000, delay=4)  # a longer episode has more time to diverge
    assert MethodConfig().delay == 0
