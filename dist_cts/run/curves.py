"""Training curves of runs, read from metrics.jsonl."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_cts.losses import RESERVED
from dist_cts.run.report import start_colours

Line = tuple[str | None, dict[str, Any], tuple[list[int], list[float]]]  # label, look, steps and values
MANY = 12  # tasks of one run that get a color each; of more, the mean stands out


def task_curves(run: Path, key: str, over: str = "step") -> dict[str, dict[int, float]]:
    """By task, the value of `key` at each step at which the run has recorded it.

    Where a run resumed from a checkpoint, the later record counts; values that were not finite do not.

    Args:
        key: loss, test_loss, accuracy, test_accuracy or another metric, or steps_per_second.
        over: step, of each task, or cumulative_inner_steps, summed over the tasks.

    Raises:
        FileNotFoundError: `run` has no metrics.jsonl.
    """
    curves: dict[str, dict[int, float]] = {}
    for record in read_records(run):
        if record.get(key) is not None:
            curves.setdefault(record["task"], {})[record[over]] = record[key]
    return {task: dict(sorted(curve.items())) for task, curve in curves.items()}


def task_means(run: Path, key: str, over: str = "cumulative_inner_steps") -> tuple[list[int], list[float]]:
    """Steps, and at each of them the mean of `key` over the tasks that have it (Figure 6a: loss); see `task_curves`."""
    curves = task_curves(run, key, over).values()
    steps = sorted({step for curve in curves for step in curve})
    values = ([curve[step] for curve in curves if step in curve] for step in steps)
    return steps, [sum(value) / len(value) for value in values]


def recorded_metrics(runs: Iterable[Path]) -> list[str]:
    """The metrics besides the loss that the runs have recorded, on training batches or on test splits."""
    keys = {key.removeprefix("test_"): None for run in runs for record in read_records(run) for key in record}
    return [key for key in keys if key not in RESERVED and key != "loss"]


def draw_curves(runs: list[Path], out: Path) -> None:
    """Writes a PNG with panels for the loss, the metrics and the steps per second, against the inner steps per task.

    Of one run, it shows a line per task; of several, a line per run, the mean over its tasks. Values on the test splits
    are dashed.

    Raises:
        ValueError: no run has recorded a step.
    """
    from matplotlib.figure import Figure

    keys = ["loss", *recorded_metrics(runs), "steps_per_second"]
    tasks = list(task_curves(runs[0], "loss"))
    if not any(task_curves(run, "loss") for run in runs):
        raise ValueError(f"no metrics recorded yet in {', '.join(map(str, runs))}")
    figure = Figure(figsize=(4.2 * len(keys) + 1.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        per_task = len(runs) == 1 and key != "steps_per_second"
        for name, style in ((key, "-"), (f"test_{key}", "--")):
            for label, look, points in _task_lines(runs[0], tasks, name) if per_task else _mean_lines(runs, name):
                marker = "." if len(points[0]) == 1 else None  # a line of one point would be invisible
                axes.plot(*points, style, marker=marker, label=label if style == "-" else None, **look)
        axes.set_xlabel("inner steps per task")
        axes.set_ylabel(key.replace("_", " ") + (", mean over tasks" if len(runs) > 1 and key != keys[-1] else ""))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(out, dpi=150)


def _mean_lines(runs: list[Path], key: str) -> Iterator[Line]:
    colours = start_colours(map(str, runs)).values() if len(runs) > 1 else ["#000000"]
    for run, colour in zip(runs, colours, strict=True):
        unique = sum(other.name == run.name for other in runs) == 1
        yield run.name if unique else str(run), {"color": colour}, task_means(run, key, "step")


def _task_lines(run: Path, tasks: list[str], key: str) -> Iterator[Line]:
    from matplotlib import colormaps

    curves = task_curves(run, key)
    for index, task in enumerate(tasks):
        points = list(curves.get(task, {})), list(curves.get(task, {}).values())
        if len(tasks) <= MANY:
            yield task, {"color": colormaps["tab20"](2 * index % 20 + index // 10)}, points  # dark colors first
        else:
            yield None, {"color": "#CCCCCC", "linewidth": 0.5}, points
    if len(tasks) > MANY:
        yield f"mean of {len(tasks)} tasks", {"color": "#000000"}, task_means(run, key, "step")


def read_records(run: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a run folder")
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a kill or a full disk can cut a line short
            yield json.loads(line)
