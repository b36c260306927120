"""Training curves of runs, read from metrics.jsonl."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_cts.losses import RESERVED
from dist_cts.run.report import start_colours


def task_means(run: Path, key: str, over: str = "cumulative_inner_steps") -> tuple[list[int], list[float]]:
    """Steps, and at each of them the mean of `key` over the tasks that have it (Figure 6a: loss).

    Where a run resumed from a checkpoint, the later record counts; values that were not finite do not.

    Args:
        key: loss, test_loss, accuracy, test_accuracy or another metric; no points if the run has not recorded it.
        over: cumulative_inner_steps, summed over the tasks, or step, of each task.

    Raises:
        FileNotFoundError: `run` has no metrics.jsonl.
    """
    values: dict[int, dict[str, float]] = {}
    for record in read_records(run):
        if record.get(key) is not None:
            values.setdefault(record[over], {})[record["task"]] = record[key]
    steps = sorted(values)
    return steps, [sum(values[step].values()) / len(values[step]) for step in steps]


def recorded_metrics(runs: Iterable[Path]) -> list[str]:
    """The metrics besides the loss that the runs have recorded, on training batches or on test splits."""
    keys = {key.removeprefix("test_"): None for run in runs for record in read_records(run) for key in record}
    return [key for key in keys if key not in RESERVED and key != "loss"]


def draw_curves(runs: list[Path], out: Path) -> None:
    """Writes a PNG: a panel for the loss and one per metric, a color per run, against the inner steps per task.

    Values on the test splits are dashed.

    Raises:
        ValueError: no run has recorded a step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = ["loss", *recorded_metrics(runs)]
    figure, panels = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 3.6), layout="constrained", squeeze=False)
    colours = start_colours(map(str, runs))
    for axes, key in zip(panels[0], keys, strict=True):
        for run in runs:
            steps, means = task_means(run, key, "step")
            axes.plot(steps, means, label=str(run), color=colours[str(run)])
            axes.plot(*task_means(run, f"test_{key}", "step"), "--", color=colours[str(run)])
        axes.set_xlabel("inner steps per task")
        axes.set_ylabel(f"{key}, mean over tasks")
        axes.spines[["top", "right"]].set_visible(False)
    if not any(len(line.get_xdata()) for line in panels[0][0].lines):
        raise ValueError(f"no metrics recorded yet in {', '.join(map(str, runs))}")
    panels[0][0].legend(frameon=False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


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
