"""Metrics of a run: metrics.jsonl, TensorBoard, and a progress bar on a terminal or plain lines in a log file."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dist_cts.distributed.placement import Placement
from dist_cts.distributed.reducer import Control
from dist_cts.progress import Progress
from dist_cts.run.console import log_rank0


class Metrics:
    """Accumulates the control tails between two logs and writes one record per task at each log.

    Only rank 0 writes and prints; the control tails carry every task's loss and accuracy.
    """

    def __init__(self, folder: Path, tasks: list[str], placement: Placement, progress: Progress, steps: int) -> None:
        """`steps`: total inner steps of the run, for the progress bar."""
        self.tasks, self.steps, self.world_size = tasks, steps, placement.world_size
        self.ranks = [ranks[0] for ranks in placement.assignment]
        self.active = placement.rank == 0
        self._lost = False  # whether records were lost to a full disk
        self._clear()
        if self.active:
            self.file = (folder / "metrics.jsonl").open("a", buffering=1)
            self.board = SummaryWriter(folder / "tensorboard", purge_step=progress.step + 1)
            terminal = sys.stderr.isatty()
            self.bar = tqdm(total=steps, initial=progress.step, unit="step", disable=not terminal, dynamic_ncols=True)

    def add(self, control: Control) -> None:
        """Adds the control tail of one reduction."""
        self._steps += control.steps
        self._loss += control.steps * control.loss
        self._accuracy += control.steps * control.accuracy
        self._wait += control.wait_seconds

    def log(self, progress: Progress) -> None:
        """Writes the means since the last log, one line per task, and resets them."""
        if self.active and self._steps.sum() > 0:
            rate = float(self._steps.max()) / (time.perf_counter() - self._since)
            loss, accuracy = self._loss / self._steps, self._accuracy / self._steps
            for task, name in enumerate(self.tasks):
                self._write(
                    progress,
                    task=name,
                    loss=round(float(loss[task]), 6),
                    accuracy=round(float(accuracy[task]), 6),
                    steps_per_second=round(rate, 3),
                    rank=self.ranks[task],
                    wait_seconds=round(float(self._wait[self.ranks[task]]), 4),
                )
            means = {"mean/loss": loss.mean(), "mean/accuracy": accuracy.mean(), "steps_per_second": rate}
            with self._best_effort():
                for tag, value in means.items():
                    self.board.add_scalar(tag, value, progress.step)
            self._show(progress, loss, accuracy, rate)
        self._clear()

    def log_test(self, progress: Progress, task: str, loss: float, accuracy: float) -> None:
        """Writes one task's loss and accuracy (0 .. 1) on its test split, for the current theta."""
        if self.active:
            self._write(progress, task=task, test_loss=round(loss, 6), test_accuracy=round(accuracy, 6))
            log_rank0(f"step {progress.step}: {task} test accuracy {100 * accuracy:.1f} %, test loss {loss:.3f}")

    def close(self) -> None:
        """Closes the files."""
        if self.active:
            self.bar.close()
            for file in (self.board, self.file):
                with self._best_effort():
                    file.close()

    def _write(self, progress: Progress, **values: float | str) -> None:
        record = {
            "step": progress.step,  # of each task
            "cumulative_inner_steps": progress.step * len(self.tasks),  # of all tasks together
            "episode": progress.episode,
            "inner_step": progress.inner_step,
            **values,
        }
        with self._best_effort():
            self.file.write(json.dumps(record) + "\n")
            for key in values.keys() - {"task", "steps_per_second", "rank"}:
                self.board.add_scalar(f"{key}/{values['task']}", values[key], progress.step)

    @contextmanager
    def _best_effort(self) -> Iterator[None]:
        """A block whose writes may fail, e.g. on a full disk: the records are lost, training continues."""
        try:
            yield
        except OSError as error:
            if not self._lost:
                log_rank0(f"warning: metrics records lost: {error}; training continues")
            self._lost = True

    def _show(self, progress: Progress, loss: torch.Tensor, accuracy: torch.Tensor, rate: float) -> None:
        mean = f"loss {loss.mean():.3f} accuracy {100 * accuracy.mean():.1f} %"
        self.bar.set_description(f"episode {progress.episode}", refresh=False)
        self.bar.set_postfix_str(mean, refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if self.bar.disable:
            tasks = " ".join(f"{name} {loss[task]:.2f}" for task, name in enumerate(self.tasks))
            log_rank0(
                f"step {progress.step}/{self.steps} episode {progress.episode} k {progress.inner_step} {mean} "
                f"{rate:.1f} steps/s data wait {float(self._wait.max()):.2f} s | {tasks}"
            )

    def _clear(self) -> None:
        tasks = len(self.tasks)
        self._steps, self._loss, self._accuracy = torch.zeros(3, tasks).unbind()
        self._wait = torch.zeros(self.world_size)
        self._since = time.perf_counter()
