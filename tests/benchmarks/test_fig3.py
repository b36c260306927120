"""The approximation error against its closed form, on losses 1/2 (theta - c)' H (theta - c)."""

import pytest
import torch
from torch import nn

from benchmarks.paper import fig3
from dist_cts import models

N, ALPHA = 6, 0.05
KS = (1, 2, 5, 12)


def quadratic():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(N, N, dtype=torch.float64, generator=generator)
    center, phi = torch.randn(2, N, dtype=torch.float64, generator=generator)
    deltas = 0.3 * torch.randn(max(KS) - 1, N, dtype=torch.float64, generator=generator)
    return root @ root.T / 2, center, phi, deltas


def closed_form(hessian, deltas, k, momentum, decay):
    """The losses are quadratic, so (theta, velocity) moves by one matrix A and the centre cancels in the error.

    A delta that enters after step i is carried by A^(k - i), in the exact trajectory by A^k.
    """
    eye, curvature = torch.eye(N, dtype=torch.float64), hessian + decay * torch.eye(N, dtype=torch.float64)
    # velocity <- momentum velocity + curvature theta; theta <- theta - alpha velocity
    step = torch.cat(
        [torch.cat([eye - ALPHA * curvature, -ALPHA * momentum * eye], 1), torch.cat([curvature, momentum * eye], 1)]
    )
    power = torch.linalg.matrix_power
    return sum(((power(step, k) - power(step, k - i))[:N, :N] @ deltas[i - 1] for i in range(1, k)), torch.zeros(N))


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_error_equals_its_closed_form(momentum, decay):
    hessian, center, phi, deltas = quadratic()
    errors = fig3.shift_errors(
        lambda theta, step: hessian @ (theta - center), phi, deltas, KS, ALPHA, momentum=momentum, weight_decay=decay
    )
    assert not errors[1].any()
    for k in KS[1:]:
        expected = closed_form(hessian, deltas, k, momentum, decay)
        assert expected.norm() > 0.01
        torch.testing.assert_close(errors[k], expected, rtol=0, atol=1e-10)


def test_softplus_replaces_every_relu_and_keeps_the_weights(monkeypatch):
    model, _ = models.build(models.ModelConfig(width=0.25), 3, "softplus")
    soft = fig3.with_softplus(model)
    assert [name for name, _ in soft.named_parameters()] == [name for name, _ in model.named_parameters()]
    x = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(soft(x), model(x))
    monkeypatch.setattr(torch, "relu", nn.functional.softplus)
    assert torch.equal(soft(x), model(x))


def test_slope_and_interval_of_a_power_law():
    line = fig3.summary((1, 10, 100), [[shift, shift + 2, shift + 4] for shift in (-0.1, 0.0, 0.1)])
    assert line["slope"] == pytest.approx(2)
    assert line["slope_ci95"] == pytest.approx(0, abs=1e-9)
    assert line["log10_error_mean"] == pytest.approx([0, 2, 4])
    assert line["log10_error_ci95"] == pytest.approx([0.1 * 4.3027 / 3**0.5] * 3, rel=1e-4)  # t of 2 degrees


def test_a_diverging_trajectory_is_an_error():
    with pytest.raises(fig3.RunError, match="not finite"):
        fig3.summary((1, 2), [[0.0, float("nan")]])
