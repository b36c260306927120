"""Figures 4 and 5 of the paper: the effect of the horizon k on meta-learning, and the paths of the methods.

python benchmarks/paper/fig4_fig5.py [--out DIR]
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.figures import BLUE, METHOD_LOOKS, ORANGE, RED, landscape, main, path, plane, save, square_grid
from benchmarks.paper.synthetic_grid import adapt, grid_quality, meta_train_grid
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.learner import InnerConfig
from dist_cts.synthetic import ENVIRONMENTS, TEST, Environment, losses

ENV = ENVIRONMENTS["released"]
INNER = InnerConfig(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0)  # section 4.1
BETA, K, M = 0.1, 100, 3
UPDATES = K * M  # meta-updates of every method (section 4.1)
HORIZONS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100)
SHORT, LONG = 5, 100
STARTS = [(-5.0, 5.0), (15.0, 5.0)]
GOOD = "loss after 100 steps"


def fixed_points(env: Environment, starts: Tensor, k: int) -> tuple[Tensor, list[list[float]]]:
    """Reptile's paths [301, G, 2] with the horizon fixed at k, and the distinct points at which they come to rest.

    The optimizer is reset at every episode, so that a meta-update is a function of phi alone and can have fixed points.
    """
    paths = meta_train_grid(env, starts, "reptile", INNER, beta=BETA, M=UPDATES, K=k, reset_optimizer=True)
    rests = paths[-1][(paths[-1] - paths[-2]).norm(dim=1) < 1e-3]
    distinct: list[Tensor] = []
    for point in rests:
        if all((point - other).norm() > 0.05 for other in distinct):
            distinct.append(point)
    return paths, [point.tolist() for point in distinct]


def best_by_horizon(env: Environment, points: Tensor) -> list[float]:
    """Loss after 100 steps from the point of the grid that is best after k steps, for k = 1 .. 100 (Figure 4c)."""
    after = [losses(env, theta).mean(1) for theta in adapt(env, points)]
    return [after[-1][loss.nan_to_num(torch.inf).argmin()].item() for loss in after]


def fig4(out: Path) -> None:
    fig, axes = plt.subplots(2, 2, figsize=(9, 7.2), layout="constrained")
    axes = axes.flatten()
    template = Environment(centers=((5, 5),), angles=(0,), coeff=(1 / 3, 1 / 3), scale=1)
    window = square_grid(200, 0, 10)
    landscape(axes[0], window, losses(template, window[:, None])[:, 0], "$f$")
    plane(axes[0], "(a) template $f(x, y)$")
    axes[0].set(xlabel="$x$", ylabel="$y$")

    window = square_grid(200, -10, 20)
    landscape(axes[1], window, losses(ENV.task(0), window[:, None])[:, 0], r"$\mathcal{L}^{(1)}$")
    centers = np.array(ENV.centers)
    axes[1].plot(*centers.T, "o", color=RED, mec="white", ms=7)
    axes[1].annotate("", centers[0], (5, 5), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 2})
    plane(axes[1], rf"(b) task 1: moved, and turned by {ENV.angles[0]:.2f} rad; dots: all centres", r"\theta")

    exact = best_by_horizon(ENV, square_grid(100))
    starts, found = square_grid(21), []
    for k in HORIZONS:
        distinct = fixed_points(ENV, starts, k)[1]
        found.append(grid_quality(ENV, torch.tensor(distinct, dtype=torch.float64)).min().item() if distinct else None)
    axes[2].plot(range(1, 101), exact, color=BLUE, label=r"$\phi^*$: best of $100^2$ points after $k$ steps")
    axes[2].plot(
        *zip(*((k, loss) for k, loss in zip(HORIZONS, found, strict=True) if loss is not None), strict=True),
        "o--",
        ms=4,
        color=ORANGE,
        label=r"$\phi^*$: best fixed point of Reptile($k$)",
    )
    axes[2].set(yscale="log", xlabel="$k$ used to find $\\phi^*$", ylabel=f"task-average {GOOD}")
    axes[2].set_ylim(top=max(exact) * 6)
    axes[2].set_title("(c) short horizon bias")
    axes[2].legend(loc="upper right")

    # In an episode the paper's methods spend the same number of steps on every task.
    spent = {name: np.zeros(UPDATES + 1) for name in ("reptile", "accurate", "cts")}
    for name, steps in spent.items():
        row = ALGORITHMS[name]
        updates = K if row.period else 1
        steps[1:] = [
            m * row.gradient_evaluations(K) + (row.gradient_evaluations(k) if row.period else K)
            for m in range(UPDATES // updates)
            for k in range(1, updates + 1)
        ]
        axes[3].plot(range(1, UPDATES + 1), steps[1:], **METHOD_LOOKS[name])
        axes[3].annotate(f"{steps[-1]:,.0f}", (UPDATES, steps[-1]), (3, -3), textcoords="offset points", fontsize=8)
    axes[3].set(yscale="log", xlabel="meta-updates", ylabel="inner-gradient steps per task", xlim=(0, 370))
    axes[3].set_title("(d) cumulative cost")
    axes[3].legend(loc="lower center")
    total = {name: int(steps[-1]) for name, steps in spent.items()}
    save(
        fig,
        out,
        "fig4",
        {
            "c": {
                "best_of_grid_after_k_steps": dict(enumerate(exact, 1)),
                "best_fixed_point_of_reptile": dict(zip(HORIZONS, found, strict=True)),
            },
            "d": {
                "inner_gradient_steps_of_one_task": total,
                "cost_ratio_to_cts": {name: steps / total["cts"] for name, steps in total.items()},
            },
        },
    )


def statements(env: Environment, starts: Tensor, reset_optimizer: bool) -> dict:
    """Mean loss after 100 steps over the grid, by method, and how often it ends below Reptile with 300 updates.

    Initializations where a method or the test optimizer diverges are excluded for all methods and listed.
    """
    rows = {
        f"reptile, {M} updates": ("reptile", M),
        f"reptile, {UPDATES} updates": ("reptile", UPDATES),
        "cts": ("cts", M),
        "no_shifting": ("no_shifting", M),
        "accurate": ("accurate", M),
    }
    ends = {"start": grid_quality(env, starts)}
    for label, (name, episodes) in rows.items():
        paths = meta_train_grid(env, starts, name, INNER, beta=BETA, M=episodes, K=K, reset_optimizer=reset_optimizer)
        ends[label] = grid_quality(env, paths[-1])
    finite = torch.stack(list(ends.values())).isfinite().all(0)
    reptile = ends[f"reptile, {UPDATES} updates"]
    return {
        "starts": len(starts),
        "starts_left_out": starts[~finite].tolist(),
        "mean_loss": {label: end[finite].mean().item() for label, end in ends.items()},
        "median_loss": {label: end[finite].median().item() for label, end in ends.items()},
        f"share_below_reptile_{UPDATES}": {
            label: (end < reptile)[finite].double().mean().item() for label, end in ends.items() if end is not reptile
        },
    }


def fig5(out: Path) -> None:
    fig, axes = plt.subplots(2, 2, figsize=(9, 7.6), layout="constrained")
    axes = axes.flatten()
    numbers: dict = {"fixed_points": {}}
    dense = square_grid(21)
    for ax, letter, k in zip(axes, "ab", (SHORT, LONG), strict=False):
        paths, rests = fixed_points(ENV, dense, k)
        for line in paths.unbind(1):
            ax.plot(*line.T.numpy(), color=BLUE, lw=0.5, alpha=0.6)
        ax.plot(*np.array(rests).T, "o", color=RED, mec="white", mew=0.8, ms=7, label="fixed point", zorder=5)
        plane(ax, f"({letter}) Reptile with $k = {k}$: {len(rests)} fixed points")
        ax.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
        resting = ((paths[-1] - paths[-2]).norm(dim=1) < 1e-3).double().mean().item()
        numbers["fixed_points"][k] = {
            "count": len(rests),
            "points": rests,
            "loss_after_100_steps": grid_quality(ENV, torch.tensor(rests, dtype=torch.float64)).tolist(),
            "share_of_starts_at_rest": resting,
        }

    points = square_grid(100)
    value = grid_quality(ENV, points)
    for ax, letter, start in zip(axes[2:], "cd", STARTS, strict=True):
        landscape(ax, points, value, f"task-average {GOOD}")
        begin = torch.tensor([start], dtype=torch.float64)
        for name in ("reptile", "accurate", "cts"):
            episodes = UPDATES if name == "reptile" else M
            walked = meta_train_grid(ENV, begin, name, INNER, beta=BETA, M=episodes, K=K)[:, 0]
            path(ax, walked, METHOD_LOOKS[name])
            numbers.setdefault("paths", {}).setdefault(str(start), {})[name] = {
                "end": walked[-1].tolist(),
                "loss_after_100_steps": grid_quality(ENV, walked[-1:]).item(),
            }
        plane(ax, rf"({letter}) {UPDATES} meta-updates from $\phi_0 = ({start[0]:.0f}, {start[1]:.0f})$")
    axes[2].legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none")
    numbers["map_of_starts"] = {"test_optimizer": TEST.model_dump(), "min": value.nan_to_num(1e9).min().item()}
    flat, printed = grid_quality(ENV, dense, INNER), grid_quality(ENVIRONMENTS["paper"], dense, INNER)
    numbers["judged_by_momentum_sgd_instead"] = {
        "mean_loss": flat[flat.isfinite()].mean().item(),
        "starts_that_diverge": flat.isfinite().logical_not().sum().item(),
        "starts_that_diverge_with_the_printed_template": printed.isfinite().logical_not().sum().item(),
    }
    numbers["starts_21_x_21"] = {
        "keep_optimizer": statements(ENV, dense, reset_optimizer=False),
        "reset_optimizer": statements(ENV, dense, reset_optimizer=True),
    }
    save(fig, out, "fig5", numbers)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], (fig4, fig5))
