"""The meta-test's report: JSON, a Markdown table like the paper's Table 1, and a bar plot."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_cts.losses import ACCURACY, Metric

Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by initialization and target


def write_report(
    folder: Path,
    config: Mapping[str, Any],
    starts: Mapping[str, Mapping],
    results: Sequence[Mapping[str, Any]],
    metric: Metric = ACCURACY,
) -> None:
    """Writes meta_test.json, meta_test.md and meta_test.png into `folder` and prints the table.

    Args:
        config: the resolved configuration.
        starts: source and metadata of each initialization except random, by name.
        results: one per job: target, start, seed and curve.
        metric: what the curves hold and the tables compare.
    """
    targets, points = config["targets"], config["eval_points"]
    summary = summarize(results, targets, metric)
    table = markdown(summary, targets, metric=metric)
    if points > 1:
        best_table = markdown(summary, targets, "best", "best_ci95", metric)
        table += f"\nThe best of the {points} evaluations of each run, selected on the test split:\n\n{best_table}"
    document = {"config": config, "starts": starts, "summary": summary, "results": results}
    (folder / "meta_test.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "meta_test.md").write_text(table)
    plot(summary, folder / "meta_test.png", metric)
    steps, seeds = config["steps"], config["seeds"]
    how = {"linear-probe": f"of a linear probe after {steps} steps", "knn": "of nearest neighbors"}
    how = how.get(config.get("protocol"), f"after {steps} steps")
    print(f"{_title(metric)} {how}, mean ± 95 % interval over {seeds} seeds:\n\n{table}")
    print(f"Results: {folder / 'meta_test.json'}, .md and .png")


def summarize(results: Sequence[Mapping[str, Any]], targets: Sequence[str], metric: Metric = ACCURACY) -> Summary:
    """Per initialization and target: last and best value, their 95 % intervals, and the values per seed.

    A share (`metric.percent`) is in %; a point that is not finite counts as NaN and is never the best one.
    """
    factor, best_of = (100 if metric.percent else 1), (np.nanmax if metric.higher_is_better else np.nanmin)
    summary: dict[str, dict[str, dict]] = {}
    for start in dict.fromkeys(result["start"] for result in results):
        summary[start] = {}
        for target in targets:
            curves = [r["curve"] for r in results if (r["start"], r["target"]) == (start, target)]
            values = [[factor * point[metric.name] for point in curve] for curve in curves]
            last = [curve[-1] for curve in values]
            best = [float(best_of(curve)) if np.isfinite(curve).any() else math.nan for curve in values]
            (mean, half), (best_mean, best_half) = interval(last), interval(best)
            summary[start][target] = {metric.name: mean, "ci95": half, "best": best_mean, "best_ci95": best_half}
            summary[start][target] |= {"seeds": last, "best_seeds": best}
    return summary


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student t); NaN for a single value."""
    from scipy import stats  # late, as it takes most of a second

    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def markdown(
    summary: Summary,
    targets: Sequence[str],
    value: str | None = None,
    interval: str = "ci95",
    metric: Metric = ACCURACY,
) -> str:
    """A table like the paper's Table 1: a row per initialization, a column per target and the average, best in bold."""
    value = value or metric.name
    means = {start: [row[target][value] for target in targets] for start, row in summary.items()}
    rows = {start: [*values, float(np.mean(values))] for start, values in means.items()}
    best = [_best(column, metric) for column in zip(*rows.values(), strict=True)]
    lines = ["| initialization | " + " | ".join([*targets, "average"]) + " |", "|---" * (len(targets) + 2) + "|"]
    for start, values in rows.items():
        halves = [*(summary[start][target][interval] for target in targets), math.nan]
        cells = []
        for mean, half, top in zip(values, halves, best, strict=True):
            text = _shown(mean, metric) if np.isnan(half) else f"{_shown(mean, metric)} ± {_shown(half, metric)}"
            cells.append(f"**{text}**" if mean == top else text)
        lines.append("| " + " | ".join([start, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _best(values: Sequence[float], metric: Metric) -> float:
    """The best of the values that are not NaN."""
    return (max if metric.higher_is_better else min)((v for v in values if not math.isnan(v)), default=math.nan)


def _shown(value: float, metric: Metric) -> str:
    return f"{value:.2f}" if metric.percent else f"{value:.4g}"


def _title(metric: Metric) -> str:
    return f"Test {metric.name}{' in %' if metric.percent else ''}"


def plot(summary: Summary, path: Path, metric: Metric = ACCURACY) -> None:
    """Writes the bar plot of `draw_bars`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = len(next(iter(summary.values())))
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * targets, 3.4), layout="constrained")
    draw_bars(axes, summary, metric)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def start_colours(starts: Iterable[str]) -> dict[str, str]:
    """A color per initialization, safe for color-blind readers (Okabe and Ito); random is gray."""
    palette = itertools.cycle(["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"])
    return {start: "#999999" if start == "random" else next(palette) for start in starts}


def draw_bars(axes: Any, summary: Summary, metric: Metric = ACCURACY) -> None:
    """One group of bars per target, one bar per initialization, with 95 % intervals."""
    colours = start_colours(summary)
    targets = list(next(iter(summary.values())))
    width = 0.8 / len(summary)
    for index, (start, row) in enumerate(summary.items()):
        place = np.arange(len(targets)) + (index - (len(summary) - 1) / 2) * width
        halves = np.nan_to_num([row[target]["ci95"] for target in targets])
        heights = np.array([row[target][metric.name] for target in targets])
        # Within 0 to 100 %.
        whiskers = np.minimum(halves, heights), np.minimum(halves, 100 - heights) if metric.percent else halves
        axes.bar(place, heights, 0.9 * width, yerr=whiskers, capsize=3, label=start, color=colours[start])
    axes.set_xticks(np.arange(len(targets)), targets)
    axes.set_ylabel(f"test {metric.name}{' (%)' if metric.percent else ''}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
