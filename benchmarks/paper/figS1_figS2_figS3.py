"""Figures 1, 2 and 3 of the paper's supplement: inner optimizers, the shifted trajectories, the eight surfaces.

python benchmarks/paper/figS1_figS2_figS3.py [--out DIR]
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection

from benchmarks.paper.fig4_fig5 import BETA, ENV, GOOD, INNER, STARTS, K, M
from benchmarks.paper.figures import BLUE, GREEN, ORANGE, RED, landscape, main, path, plane, save, square_grid
from benchmarks.paper.synthetic_grid import grid_quality, meta_train_grid
from dist_cts.learner import InnerConfig
from dist_cts.synthetic import losses, meta_train_point

OPTIMIZERS = {
    "SGD": (InnerConfig(optimizer="sgd", lr=0.05, momentum=0, weight_decay=0), GREEN, (0, (4, 1.5))),
    "momentum": (INNER, BLUE, "-"),
    "Adam": (InnerConfig(optimizer="adam", lr=0.05, momentum=0.9, weight_decay=0), RED, (0, (1.2, 1))),
}
SHOWN_TASKS = 4


def fig_s1(out: Path) -> None:
    points, grid = square_grid(115, -6, 17), square_grid(21)
    value = grid_quality(ENV, points)
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.1), layout="constrained")
    numbers = {}
    for name, (inner, *_) in OPTIMIZERS.items():
        ends = grid_quality(ENV, meta_train_grid(ENV, grid, "cts", inner, beta=BETA, M=M, K=K)[-1])
        numbers[name] = {
            "optimizer": inner.model_dump(),
            "starts_left_out": ends.isfinite().logical_not().sum().item(),
            "mean_loss_after_100_steps": ends[ends.isfinite()].mean().item(),
            "median_loss_after_100_steps": ends[ends.isfinite()].median().item(),
        }
    for ax, letter, start in zip(axes, "ab", STARTS, strict=True):
        landscape(ax, points, value, f"task-average {GOOD}")
        begin = torch.tensor([start], dtype=torch.float64)
        for name, (inner, color, style) in OPTIMIZERS.items():
            walked = meta_train_grid(ENV, begin, "cts", inner, beta=BETA, M=M, K=K)[:, 0]
            path(ax, walked, {"color": color, "linestyle": style, "label": name})
            numbers[name][f"from {start}"] = grid_quality(ENV, walked[-1:]).item()
        plane(ax, rf"({letter}) Ours from $\phi_0 = ({start[0]:.0f}, {start[1]:.0f})$")
    axes[0].legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none")
    save(fig, out, "figS1", numbers)


def fig_s2(out: Path) -> None:
    """One episode, theta in its two moves: the gradient step and the shift."""
    fig, axes = plt.subplots(2, SHOWN_TASKS, figsize=(12, 6.4), layout="constrained", sharex=True, sharey=True)
    window = square_grid(200, -10, 30)
    numbers = {}
    for row, start in zip(axes, STARTS, strict=True):
        run = meta_train_point(ENV, start, "cts", INNER, beta=BETA, M=1, K=K)
        delta = run.phi.diff(dim=0)  # [K, 2]
        numbers[f"from {start}"] = {"phi": run.phi.tolist(), "theta": run.theta[:SHOWN_TASKS].tolist()}
        for task, ax in enumerate(row):
            landscape(ax, window, losses(ENV.task(task), window[:, None])[:, 0])
            after = run.theta[task]  # [K, 2]
            before = torch.cat([run.phi[:1], after[:-1]])
            stepped = after - delta
            for moves, color, width, label in (
                (torch.stack([before, stepped], 1), BLUE, 1.2, r"gradient step of $\theta$"),
                (torch.stack([stepped, after], 1), ORANGE, 3.0, r"shift by $\Delta_k$"),
            ):
                ax.add_collection(LineCollection(moves.numpy(), colors=color, linewidths=width, label=label, zorder=3))
            ax.plot(*run.phi.T.numpy(), color=GREEN, lw=2.2, label=r"$\phi$", zorder=4)
            ax.plot(*run.phi[0].numpy(), "o", color="white", mec="black", ms=7, zorder=6)
            ax.plot(*after[-1].numpy(), "X", color=BLUE, mec="white", ms=9, zorder=6)
            plane(ax, rf"task {task + 1}, $\phi_0 = ({start[0]:.0f}, {start[1]:.0f})$", r"\theta")
            ax.label_outer()
    axes[1][3].legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    save(fig, out, "figS2", numbers)


def fig_s3(out: Path) -> None:
    fig, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained", sharex=True, sharey=True)
    window = square_grid(200, -15, 25)
    for task, ax in enumerate(axes.flat):
        landscape(ax, window, losses(ENV.task(task), window[:, None])[:, 0])
        ax.plot(*ENV.centers[task], "o", color=RED, mec="white", ms=7)
        plane(ax, rf"$\mathcal{{L}}^{{({task + 1})}}$, turned by {ENV.angles[task]:.2f} rad", r"\theta")
        ax.label_outer()
    save(fig, out, "figS3", {"environment": ENV.model_dump()})


if __name__ == "__main__":
    main(__doc__.splitlines()[0], (fig_s1, fig_s2, fig_s3))
