"""Metrics of a run: metrics.jsonl, its loggers, and a progress bar on a terminal or plain lines in a log file."""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from dist_cts.distributed.placement import Placement
from dist_cts.distributed.reducer import Control
from dist_cts.errors import RepeatedWarning, RunError, cause_of
from dist_cts.losses import Metric
from dist_cts.progress import Progress
from dist_cts.run.console import log_rank0
from dist_cts.run.folder import RunFolder
from dist_cts.run.loggers import Loggers
from dist_cts.run.record_file import RecordFile


class Metrics:
    """Accumulates the control tails between two logs and writes one record per task at each log.

    Only rank 0 writes and prints; the control tails carry every task's loss and metric.
    """

    def __init__(
        self,
        folder: RunFolder,
        tasks: Mapping[str, Metric | None],
        placement: Placement,
        progress: Progress,
        steps: int,
        loggers: Loggers,
    ) -> None:
        """`tasks`: the metric of each; `steps`: total inner steps of the run, for the progress bar.

        A run without a folder keeps the records in `records`, on rank 0.

        Raises:
            OSError: the folder cannot be written.
        """
        self.tasks, self.steps, self.world_size = dict(tasks), steps, placement.world_size
        self.ranks = [ranks[0] for ranks in placement.assignment]
        self.active = placement.rank == 0
        self._warn = RepeatedWarning(log_rank0)
        self.records: list[dict[str, Any]] = []
        self.folder, self.file, self.loggers = folder, None, loggers
        self._clear()
        if self.active:
            terminal = sys.stderr.isatty()
            self.bar = tqdm(total=steps, initial=progress.step, unit="step", disable=not terminal, dynamic_ncols=True)
        if self.active and folder.path is not None:
            self.file = RecordFile(folder.path / "metrics.jsonl")

    def add(self, control: Control) -> None:
        """Adds the control tail of one reduction."""
        self._steps += control.steps
        self._loss += control.steps * control.loss
        self._metric += control.steps * control.metric
        self._wait += control.wait_seconds

    def log(self, progress: Progress) -> None:
        """Writes the means since the last log, one line per task, and resets them."""
        if self.active and self._steps.sum() > 0:
            rate = float(self._steps.max()) / (time.perf_counter() - self._since)
            losses, metrics = (self._loss / self._steps).tolist(), (self._metric / self._steps).tolist()
            means = defaultdict[str, list[float]](list, {"loss": losses})  # over the tasks that report it
            for (task, metric), loss, value, rank in zip(self.tasks.items(), losses, metrics, self.ranks, strict=True):
                values = {"loss": loss}
                if metric is not None and not metric.pooled:
                    values[metric.name] = metric.finish(value)
                    means[metric.name].append(values[metric.name])
                self._write(
                    progress,
                    task=task,
                    **{key: _rounded(value) for key, value in values.items()},
                    steps_per_second=round(rate, 3),
                    rank=rank,
                    wait_seconds=round(float(self._wait[rank]), 4),
                )
            mean = {key: sum(values) / len(values) for key, values in means.items()}
            scalars = {f"mean/{key}": value for key, value in mean.items()} | {"steps_per_second": rate}
            self._log(scalars, progress)
            self._show(progress, mean, losses, rate)
        self._clear()

    def log_test(self, progress: Progress, task: str, values: Mapping[str, float]) -> None:
        """Writes one task's loss and metric on its test split, for the current theta."""
        if self.active:
            self._write(progress, task=task, **{f"test_{key}": _rounded(value) for key, value in values.items()})
            metric = self.tasks[task]
            shown = f"test {metric.show(values[metric.name])}, " if metric is not None else ""
            log_rank0(f"step {progress.step}: {task} {shown}test loss {values['loss']:.3f}")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Closes the file, then the loggers, which may read it."""
        if self.active:
            self.bar.close()
            if self.file is not None:
                self.file.close()
            self.loggers.close(failed=failure is not None)

    def _write(self, progress: Progress, **values: float | str | None) -> None:
        record = {
            "step": progress.step,  # of each task
            "cumulative_inner_steps": progress.step * len(self.tasks),  # of all tasks together
            "episode": progress.episode,
            "inner_step": progress.inner_step,
            **values,
        }
        if self.file is None:
            self.records.append(record)
            return
        shown = values.keys() - {"task", "steps_per_second", "rank"}
        scalars = {f"{key}/{values['task']}": values[key] for key in shown if values[key] is not None}
        self._log(scalars, progress, json.dumps(record) + "\n")

    def _log(self, scalars: Mapping[str, float], progress: Progress, line: str = "") -> None:
        """Passes on scalars and a line of metrics.jsonl. Where that fails they are lost, and training continues."""
        try:
            self.folder.restore()
            if line:
                self.file.append(line.encode())
        except RunError as error:  # another run has taken the folder
            self._warn(f"warning: metrics records lost: {error}", "; training continues to the next checkpoint")
            return
        except OSError as error:
            fault = f"warning: metrics records lost: {cause_of(error)}"
            self._warn(fault, f" ({self.folder.path}); training continues")
        self.loggers.log(scalars, progress.step)

    def _show(self, progress: Progress, means: Mapping[str, float], losses: list[float], rate: float) -> None:
        metrics = {metric.name: metric for metric in self.tasks.values() if metric is not None}
        mean = " ".join(
            [f"loss {means['loss']:.3f}", *(metrics[key].show(means[key]) for key in means if key in metrics)]
        )
        self.bar.set_description(f"episode {progress.episode}", refresh=False)
        self.bar.set_postfix_str(mean, refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if self.bar.disable:
            tasks = " ".join(f"{name} {loss:.2f}" for name, loss in zip(self.tasks, losses, strict=True))
            log_rank0(
                f"step {progress.step}/{self.steps} episode {progress.episode} k {progress.inner_step} {mean} "
                f"{rate:.1f} steps/s data wait {float(self._wait.max()):.2f} s | {tasks}"
            )

    def _clear(self) -> None:
        tasks = len(self.tasks)
        self._steps, self._loss, self._metric = torch.zeros(3, tasks).unbind()
        self._wait = torch.zeros(self.world_size)
        self._since = time.perf_counter()


def _rounded(value: float) -> float | None:
    """As JSON holds it, which has no NaN and no infinity."""
    return round(value, 6) if math.isfinite(value) else None
