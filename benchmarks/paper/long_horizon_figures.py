"""Draws Figures 6, 7 and 8 from the long-horizon study's finished runs.

python benchmarks/paper/long_horizon_figures.py            (tables.py writes the tables of long_horizon.md)
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.paper.figures import RESULTS, save
from benchmarks.paper.long_horizon_report import (
    COMPARED,
    FOLDER,
    LOOKS,
    MAIN_K,
    Records,
    Value,
    control,
    endpoint,
    endpoints,
    read,
)
from dist_cts.run.report import interval


def draw_fig6(records: Records, out: Path) -> None:
    """(a) training loss at K = 1000, (b) the endpoint of every method there, (c, d) endpoint and control over K."""
    fig, (a, b, c, d) = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    curves, bars = {}, {}
    for method, (label, colour) in LOOKS.items():
        runs = [run for run in records.main.get((method, MAIN_K), {}).values() if "loss" in run]
        if not runs:
            continue
        if not method.startswith(("mtl", "single")):
            means = np.array([np.mean(list(run["loss"].values()), axis=0) for run in runs])
            steps = np.array(runs[0]["steps"]) * len(runs[0]["loss"])
            a.plot(steps, means.mean(0), label=label, color=colour)
            a.fill_between(steps, means.min(0), means.max(0), color=colour, alpha=0.15, lw=0)
            curves[method] = {"cumulative_inner_steps": steps.tolist(), "loss": means.mean(0).tolist()}
        bars[method] = interval(list(endpoints(records, (method, MAIN_K)).values()))
    if records.random is not None:
        bars["random"] = endpoint(records.random["accuracy"]), math.nan
    a.set(
        title=f"(a) meta-training, $K = {MAIN_K}$", xlabel="cumulative inner steps", ylabel="task-average training loss"
    )
    a.legend()
    _bars(b, bars)
    b.set_title(f"(b) four targets, $K = {MAIN_K}$")
    by_K = {"endpoint_by_K": _over_K(c, records, endpoint), "control_by_K": _over_K(d, records, control)}
    c.set_title("(c) four targets")
    d.set_title("(d) unseen classes of TinyImageNet")
    save(
        fig, out, "long_horizon_fig6", {"curves": curves, "endpoint": {m: value[0] for m, value in bars.items()}} | by_K
    )


def _over_K(ax: Axes, records: Records, value: Value) -> dict[str, dict[int, float]]:
    """Draws the mean and 95 % interval of `value` over K and returns the means."""
    means: dict[str, dict[int, float]] = {}
    for method in COMPARED:
        points = {
            K: interval(list(endpoints(records, (name, K), value).values()))
            for name, K in sorted(records.main)
            if name == method
        }
        if points:
            _error_bars(ax, method, list(points), list(points.values()))
            means[method] = {K: mean for K, (mean, _) in points.items()}
    ax.set(xscale="log", xlabel="$K$ of the meta-training", ylabel="test accuracy (%)")
    ax.legend()
    return means


def _error_bars(ax: Axes, method: str, x: list, intervals: list[tuple[float, float]]) -> None:
    mean, half = np.array(intervals).T
    label, colour = LOOKS[method]
    ax.errorbar(x, mean, np.nan_to_num(half), label=label, color=colour, marker="o", ms=4, capsize=2)


def draw_fig7(records: Records, out: Path) -> None:
    """The endpoint along meta-training at K = 1000: snapshots with one meta-test seed, then the end."""
    fig, ax = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
    curves = {}
    for method in COMPARED:
        runs = [run for run in records.main.get((method, MAIN_K), {}).values() if "snapshots" in run]
        if not runs:
            continue
        steps = [*map(int, runs[0]["snapshots"]), runs[0]["steps"][-1]]
        values = [[*map(endpoint, run["snapshots"].values()), endpoint(run["accuracy"])] for run in runs]
        points = [interval(list(column)) for column in zip(*values, strict=True)]
        _error_bars(ax, method, steps, points)
        curves[method] = {"steps_per_task": steps, "accuracy": [mean for mean, _ in points]}
    ax.set(xscale="log", xlabel="inner steps per task in meta-training", ylabel="four targets (%)")
    ax.legend()
    save(fig, out, "long_horizon_fig7", {"curves": curves})


def draw_fig8(records: Records, out: Path) -> None:
    """The ablation: CTS minus the others, paired by seed, at each K."""
    horizons = sorted({K for method, K in records.main if method in COMPARED})
    fig, ax = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    numbers: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for place, method in enumerate(COMPARED[1:]):
        for index, K in enumerate(horizons):
            ours, theirs = endpoints(records, ("cts", K)), endpoints(records, (method, K))
            differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            if not differences:
                continue
            mean, half = interval(differences)
            x = index + (place - 1) * 0.2
            ax.errorbar(
                x,
                mean,
                np.nan_to_num(half),
                color=LOOKS[method][1],
                marker="o",
                capsize=3,
                label=LOOKS[method][0] if index == 0 else None,
            )
            ax.plot([x] * len(differences), differences, ".", color=LOOKS[method][1], alpha=0.4)
            numbers[method][K] = differences
    ax.axhline(0, color="#999999", lw=0.8)
    ax.set_xticks(range(len(horizons)), [f"$K = {K}$" for K in horizons])
    ax.set_ylabel("CTS minus ... (points, paired by seed)")
    ax.legend()
    save(fig, out, "long_horizon_fig8", {"cts_minus": numbers})


def _bars(ax: Axes, values: dict[str, tuple[float, float]]) -> None:
    order = sorted(values, key=lambda method: values[method][0])
    for place, method in enumerate(order):
        mean, half = values[method]
        ax.barh(place, mean, 0.75, xerr=np.nan_to_num(half), color=LOOKS[method][1], error_kw={"capsize": 2, "lw": 1})
    ax.set_yticks(range(len(order)), [LOOKS[method][0] for method in order])
    ax.set_xlabel("test accuracy (%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the runs' JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    args = parser.parse_args()
    records = read(args.results)
    if not records.main:
        raise SystemExit(f"{args.results}: no main run is finished; benchmarks/paper/long_horizon.py makes them")
    for draw in (draw_fig6, draw_fig7, draw_fig8):
        draw(records, args.out)


if __name__ == "__main__":
    main()
