"""The synthetic tasks: their surface, the grid against the learners, and what launch/synthetic.py writes."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.paper.synthetic_grid import gradients, grid_quality, meta_train_grid
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.commands import synthetic
from dist_cts.errors import RunError
from dist_cts.learner import InnerConfig
from dist_cts.synthetic import (
    ENVIRONMENTS,
    METHODS,
    TEST,
    Environment,
    load_environment,
    losses,
    meta_train_point,
    quality,
)

REPO = Path(__file__).parent.parent
ENV = ENVIRONMENTS["released"]
MOMENTUM = InnerConfig(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0)
STARTS = torch.tensor([[-5.0, 5.0], [15.0, 5.0], [4.0, 4.5]], dtype=torch.float64)


def random_points(*shape):
    return 20 * torch.rand(*shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 5


def test_unturned_paper_template_is_the_printed_function():
    env = Environment(centers=((5, 5),), angles=(0,), coeff=ENVIRONMENTS["paper"].coeff, scale=1)
    points = random_points(50, 1)
    x, y = points[:, 0].T
    f = ((x**2 - 10 * x + y + 9) ** 2 + (x + y**2 - 10 * y + 13) ** 2) / 3
    torch.testing.assert_close(losses(env, points)[:, 0], f, rtol=1e-12, atol=1e-9)


def test_released_task_is_the_formula_of_its_constants():
    point, angle = (1.3, -2.1), 4.4152  # task 3 has its centre at (5 + 7, 5)
    dx, dy = point[0] - 12, point[1] - 5
    u = (math.cos(angle) * dx - math.sin(angle) * dy) / 3
    v = (math.sin(angle) * dx + math.cos(angle) * dy) / 3
    expected = 0.7385 * (u**2 + v - 11) ** 2 + 0.9954 * (u + v**2 - 7) ** 2
    got = losses(ENV, torch.tensor([[point]], dtype=torch.float64))
    assert got.shape == (1, 8)
    assert got[0, 2].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_closed_form_gradient_equals_autograd(name):
    env = ENVIRONMENTS[name]
    points = random_points(7, env.tasks).requires_grad_()
    (expected,) = torch.autograd.grad(losses(env, points).sum(), points)
    torch.testing.assert_close(gradients(env, points.detach()), expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "reset"), [("sgd", 0.9, False), ("sgd", 0, True), ("adam", 0.9, True)]
)
def test_grid_equals_the_learners_loop(optimizer, momentum, reset):
    inner = InnerConfig(optimizer=optimizer, lr=0.05, momentum=momentum, weight_decay=0)
    for algorithm, start in product(METHODS, (0, 1)):
        setting = {"beta": 0.1, "M": 3, "K": 7, "reset_optimizer": reset}
        grid = meta_train_grid(ENV, STARTS, algorithm, inner, **setting)
        point = meta_train_point(ENV, tuple(STARTS[start].tolist()), algorithm, inner, **setting)
        torch.testing.assert_close(grid[:, start], point.phi, rtol=0, atol=1e-10, msg=algorithm)


def test_spent_steps_are_those_of_the_table():
    for algorithm in METHODS:
        run = meta_train_point(ENV, (1, 2), algorithm, MOMENTUM, beta=0.1, M=2, K=6)
        assert run.inner_gradient_steps[-1] == 2 * ALGORITHMS[algorithm].gradient_evaluations(6), algorithm
        assert len(run.inner_gradient_steps) == len(run.phi) == (3 if algorithm == "reptile" else 13)
        assert run.theta.shape == (8, 12, 2)


def test_quality_is_the_mean_loss_after_adam():
    expected = []
    for task in range(8):
        theta = torch.nn.Parameter(STARTS[1].clone())
        optimizer = torch.optim.Adam([theta], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            losses(ENV.task(task), theta[None])[0].backward()
            optimizer.step()
        expected.append(losses(ENV.task(task), theta.detach()[None])[0])
    torch.testing.assert_close(quality(ENV, STARTS)[1], torch.stack(expected).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(grid_quality(ENV, STARTS), quality(ENV, STARTS), rtol=1e-9, atol=0)
    assert TEST.lr == 0.1


def test_diverging_trajectory_names_task_and_step():
    with pytest.raises(RunError, match=r"task \d diverges at step \d+"):
        meta_train_point(ENVIRONMENTS["paper"], (-5, 5), "cts", MOMENTUM, beta=0.1, M=3, K=100)


def test_environment_file(tmp_path):
    file = tmp_path / "env.json"
    file.write_text(json.dumps(ENV.model_dump(), indent="\t"))
    assert load_environment(str(file)) == ENV
    file.write_text(json.dumps(ENV.model_dump() | {"angles": [1.0]}))
    with pytest.raises(ValueError, match=r"env.json: 8 centers but 1 angles"):
        load_environment(str(file))
    file.write_text(json.dumps({"coef": [1, 1]} | ENV.model_dump(exclude={"coeff"})))
    with pytest.raises(ValueError, match=r"env.json: coeff: .*; coef: "):
        load_environment(str(file))
    with pytest.raises(FileNotFoundError, match="choose released or paper"):
        load_environment("relased")


# ---------------------------------------------------------------- launch/synthetic.py


def command(*arguments):
    """The exit code of launch/synthetic.py in this process."""
    try:
        return synthetic.main([*map(str, arguments)])
    except SystemExit as usage:
        return usage.code


def independent_loop(algorithm, start, alpha, beta, K, M):
    """Algorithms 1 and 2 with torch.optim and autograd, written from the paper: phi and theta of the first task."""

    def loss(t, p):
        dx, dy, a = p[0] - 5 - 7 * math.sin(math.tau * t / 8), p[1] - 5 - 7 * math.cos(math.tau * t / 8), angles[t]
        u, v = (math.cos(a) * dx - math.sin(a) * dy) / 3, (math.sin(a) * dx + math.cos(a) * dy) / 3
        return 0.7385 * (u**2 + v - 11) ** 2 + 0.9954 * (u + v**2 - 7) ** 2

    angles = [0.9192, 1.1151, 4.4152, 5.9906, 3.9030, 4.0177, 3.1373, 0.2803]
    phi = torch.tensor(start, dtype=torch.float64)
    thetas = [torch.nn.Parameter(phi.clone()) for _ in angles]
    optimizers = [torch.optim.SGD([theta], lr=alpha, momentum=0.9) for theta in thetas]
    phis, first = [phi.tolist()], []
    for _ in range(M):
        for theta in thetas:
            theta.data.copy_(phi)
        for k in range(1, K + 1):
            for t, (theta, optimizer) in enumerate(zip(thetas, optimizers, strict=True)):
                optimizer.zero_grad()
                loss(t, theta).backward()
                optimizer.step()
            if algorithm == "cts" or k == K:
                delta = -beta * torch.stack([phi - theta.data for theta in thetas]).mean(0)
                phi = phi + delta
                phis.append(phi.tolist())
                for theta in thetas if algorithm == "cts" else ():
                    theta.data.add_(delta)
            first.append(thetas[0].tolist())
    return phis, first


@pytest.mark.parametrize("algorithm", ["cts", "reptile"])
def test_trajectory_file_equals_an_independent_loop(algorithm, tmp_path):
    assert command("--algorithm", algorithm, "--start", -5, 5, "--inner-steps", 40, "--out", tmp_path) == 0
    written = json.loads((tmp_path / "trajectory.json").read_text())
    phi, theta = independent_loop(algorithm, (-5, 5), alpha=0.05, beta=0.1, K=40, M=3)
    for got, expected in ((written["phi"], phi), (written["theta"][0], theta)):
        got, expected = (torch.tensor(points, dtype=torch.float64) for points in (got, expected))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    end = quality(ENV, torch.tensor(phi[-1:], dtype=torch.float64)).item()
    assert written["loss_after_100_steps"] == pytest.approx(end, rel=1e-6)
    assert written["inner_gradient_steps"][-1] == 120


def test_command_as_a_user_starts_it(tmp_path):
    line = [sys.executable, REPO / "launch/synthetic.py", "--inner-steps", "5", "--out", tmp_path / "new"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "after 15 meta-updates and 15 inner-gradient steps per task" in done.stdout
    assert (tmp_path / "new" / "trajectory.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--env", "paper"), 1, "diverges at step"),
        (("--env", "nowhere.json"), 2, "nowhere.json"),
        (("--inner-lr", "-1"), 2, "--inner-lr"),
        (("--inner-steps", "0"), 2, "--inner-steps"),
        (("--start", "1", "nan"), 2, "--start"),
        (("--test-optimizer", "sgd", "--test-lr", "9", "--inner-steps", "2"), 1, "--test-lr below 9"),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, text, tmp_path, capsys):
    assert command(*arguments, "--out", tmp_path) == code
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
