"""Shared style of the paper's figures: colors, maps of the plane; saves each figure with its numbers as JSON."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

RESULTS = Path(__file__).resolve().parent.parent / "results" / "paper"
# Okabe and Ito's colors, distinct for color-blind readers; each method also has its own line style.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
METHOD_LOOKS = {
    "cts": {"color": BLUE, "label": "Ours (cts)", "linestyle": "-"},
    "accurate": {"color": ORANGE, "label": "Ours Accurate", "linestyle": (0, (4, 1.5))},
    "reptile": {"color": RED, "label": "Reptile", "linestyle": (0, (1.2, 1))},
    "no_shifting": {"color": GREEN, "label": "No Shifting", "linestyle": (0, (5, 1, 1, 1))},
}
LANDSCAPE = LinearSegmentedColormap.from_list("landscape", ["#4a4a4a", "#8d8d8d", "#c8c8c8", "#ffffff"])
HALO = [Stroke(linewidth=3.2, foreground="white"), Normal()]  # lines stay legible on a dark map

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "savefig.bbox": "tight",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "mathtext.fontset": "cm",
    }
)


def square_grid(n: int, low: float = -5.0, high: float = 15.0) -> Tensor:
    """n x n points of the square [low, high]^2, float64 [n * n, 2], x slowest."""
    axis = torch.linspace(low, high, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def landscape(ax: Axes, points: Tensor, values: Tensor, label: str | None = None, levels: int = 12) -> None:
    """Filled log-spaced contours of `values` [n * n] on a `square_grid`; darker is lower."""
    n = round(len(points) ** 0.5)
    x, y, z = (t.view(n, n).T.numpy() for t in (points[:, 0], points[:, 1], values))
    z = np.where(np.isfinite(z), z, np.nanmax(z[np.isfinite(z)]))
    low, high = np.quantile(z, [0.005, 0.995])
    edges = np.geomspace(low, high, levels)
    filled = ax.contourf(x, y, z, levels=edges, cmap=LANDSCAPE, norm=LogNorm(low, high), extend="both")
    filled.set_rasterized(True)
    if label:
        bar = ax.figure.colorbar(filled, ax=ax, fraction=0.046, pad=0.03, ticks=edges[:: max(1, levels // 4)])
        bar.ax.set_yticklabels([f"{edge:.0f}" if edge > 9.5 else f"{edge:.2g}" for edge in bar.get_ticks()])
        bar.set_label(label)
        bar.outline.set_visible(False)


def plane(ax: Axes, title: str, symbol: str = r"\phi") -> None:
    """A panel of the parameter plane: equal axes and the symbol's coordinates."""
    ax.set_aspect("equal")
    ax.set_title(title)
    ax.set_xlabel(rf"${symbol}_x$")
    ax.set_ylabel(rf"${symbol}_y$", labelpad=1)


def path(ax: Axes, points: Tensor, look: dict) -> None:
    """A trajectory [n, 2] with a white halo, a circle where it starts and a cross where it ends."""
    ax.plot(*points.T.numpy(), path_effects=HALO, **look)
    ax.plot(*points[0].numpy(), "o", color="white", mec="black", ms=8, zorder=6, clip_on=False)
    ax.plot(*points[-1].numpy(), "X", ms=8, mec="white", mew=1, color=look["color"], zorder=5)


def save(fig: Figure, out: Path, name: str, numbers: dict) -> None:
    """Writes OUT/NAME.png and OUT/NAME.json; the JSON also holds the date and the machine."""
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / f"{name}.png")
    plt.close(fig)
    record = {"date": str(date.today()), "machine": f"{platform.machine()}, torch {torch.__version__}"} | numbers
    (out / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"{out / name}.png, .json", flush=True)


def main(description: str, draw: Sequence[Callable[[Path], None]]) -> None:
    """The command line of a figure script: --out; prints the time of each figure."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default {RESULTS})")
    out = parser.parse_args().out
    for function in draw:
        started = time.perf_counter()
        function(out)
        print(f"  {time.perf_counter() - started:.1f} s", flush=True)
