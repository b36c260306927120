"""Training curves of runs, read from metrics.jsonl."""

import json
from contextlib import suppress
from pathlib import Path

from dist_cts.run.report import start_colours


def task_means(run: Path, key: str, over: str = "cumulative_inner_steps") -> tuple[list[int], list[float]]:
    """Steps, and at each of them the mean of `key` over the tasks (Figure 6a: loss).

    Where a run resumed from a checkpoint, the later record counts.

    Args:
        key: loss, accuracy, test_loss or test_accuracy; no points if the run has not recorded it.
        over: cumulative_inner_steps, summed over the tasks, or step, of each task.

    Raises:
        FileNotFoundError: `run` has no metrics.jsonl.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a run folder")
    values: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a kill or a full disk can cut a line short
            record = json.loads(line)
            if key in record:
                values.setdefault(record[over], {})[record["task"]] = record[key]
    steps = sorted(values)
    return steps, [sum(values[step].values()) / len(values[step]) for step in steps]


def draw_curves(runs: list[Path], out: Path) -> None:
    """Writes a PNG with loss and accuracy against the inner steps per task, a color per run; test splits are dashed.

    Raises:
        ValueError: no run has recorded a step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = start_colours(map(str, runs))
    for axes, key in zip(panels, ("loss", "accuracy"), strict=True):
        for run in runs:
            steps, means = task_means(run, key, "step")
            axes.plot(steps, means, label=str(run), color=colours[str(run)])
            axes.plot(*task_means(run, f"test_{key}", "step"), "--", color=colours[str(run)])
        axes.set_xlabel("inner steps per task")
        axes.set_ylabel(f"{key}, mean over tasks")
        axes.spines[["top", "right"]].set_visible(False)
    if not any(len(line.get_xdata()) for line in panels[0].lines):
        raise ValueError(f"no metrics recorded yet in {', '.join(map(str, runs))}")
    panels[0].legend(frameon=False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
