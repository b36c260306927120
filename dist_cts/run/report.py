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
    metrics: Mapping[str, Metric],
) -> None:
    """Writes meta_test.json, meta_test.md and meta_test.png into `folder` and prints the tables.

    Targets with different metrics have tables and plots of their own.

    Args:
        config: the resolved configuration.
        starts: source and metadata of each initialization except random, by name.
        results: one per job: target, start, seed and curve.
        metrics: what the curves of each target hold and the tables compare.
    """
    groups: dict[Metric, list[str]] = {}
    for target, metric in metrics.items():
        groups.setdefault(metric, []).append(target)
    points, steps, seeds = config["eval_points"], config["steps"], config["seeds"]
    summaries = {metric: summarize(results, targets, metric) for metric, targets in groups.items()}
    tables = {metric: markdown(summaries[metric], targets, metric=metric) for metric, targets in groups.items()}
    best = ""
    if points > 1:
        best = f"\nThe best of the {points} evaluations of each run, selected on the test split:\n\n"
        best += "\n".join(
            markdown(summaries[metric], targets, "best", "best_ci95", metric) for metric, targets in groups.items()
        )
    summary: dict[str, dict] = {}
    for start, row in (item for part in summaries.values() for item in part.items()):
        summary[start] = summary.get(start, {}) | row
    document = {"config": config, "starts": starts, "summary": summary, "results": results}
    (folder / "meta_test.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "meta_test.md").write_text("\n".join(tables.values()) + best)
    plot(summaries, groups, folder / "meta_test.png")
    how = {"linear-probe": f"of a linear probe after {steps} steps", "knn": "of nearest neighbors"}
    how = how.get(config.get("protocol"), f"after {steps} steps")
    for metric, table in tables.items():
        print(f"{_title(metric)} {how}, mean ± 95 % interval over {seeds} seeds:\n\n{table}")
    print(f"{best.lstrip()}\nResults: {folder / 'meta_test.json'}, .md and .png")


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


def plot(summaries: Mapping[Metric, Summary], groups: Mapping[Metric, Sequence[str]], path: Path) -> None:
    """Writes the bar plots of `draw_bars`, one per metric and its targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [len(targets) for targets in groups.values()]
    size = 2 * len(counts) + 1.6 * sum(counts), 3.4
    figure, axes = pyplot.subplots(
        1, len(counts), figsize=size, width_ratios=counts, squeeze=False, layout="constrained"
    )
    for each, (metric, summary) in zip(axes[0], summaries.items(), strict=True):
        draw_bars(each, summary, metric)
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
