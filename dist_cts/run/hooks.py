"""Hooks that run after every inner step: an ordered list, the same on every rank."""

import json
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from dist_cts.algorithms.table import Algorithm
from dist_cts.checkpoint.manager import CheckpointManager
from dist_cts.checkpoint.none import NoCheckpoints
from dist_cts.checkpoint.phi import SNAPSHOTS, export_phi
from dist_cts.data.tasks import open_split
from dist_cts.distributed.placement import Placement
from dist_cts.distributed.process_group import check_same_bits, gather
from dist_cts.distributed.reducer import Control, MetaReducer
from dist_cts.errors import RepeatedWarning, RunError, cause_of
from dist_cts.run.config import TrainConfig
from dist_cts.run.console import log_rank0
from dist_cts.run.folder import RunFolder
from dist_cts.run.metrics import Metrics
from dist_cts.run.shutdown import StopRequest
from dist_cts.state import TrainState

Hook = Callable[[], None]


class Hooks:
    """Logging, evaluation, checks, snapshots and checkpoints. All ranks make each decision at the same step."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        algorithm: Algorithm,
        placement: Placement,
        reducer: MetaReducer,
        metrics: Metrics,
        checkpoints: CheckpointManager | NoCheckpoints,
        folder: RunFolder,
        stop: StopRequest,
    ) -> None:
        self.config, self.state, self.algorithm, self.placement = config, state, algorithm, placement
        self.reducer, self.metrics, self.checkpoints, self.stop = reducer, metrics, checkpoints, stop
        self.folder, self.warn = folder, RepeatedWarning(log_rank0)
        self.started = time.monotonic()
        self.diverging: set[int] = set()  # tasks already reported
        self.restarted: dict[int, int] = {}  # the step after which a task's learner restarted from phi
        self.order: tuple[Hook, ...] = (
            self.request_stop,  # into the next reduction's control tail
            self.read_controls,  # of the reductions that have completed
            self._every(config.log_every, self.log),
            self._every(config.eval_every, self.evaluate),
            self.check_phi,
            self._every(config.snapshot_every, self.snapshot),  # before the checkpoint: a resumed run misses none
            self.save,
        )

    def __call__(self) -> None:
        """Runs the hooks of the finished step."""
        for hook in self.order:
            hook()

    def request_stop(self) -> None:
        """Requests a stop of all ranks after a signal to this rank or after `max_minutes`."""
        minutes = self.config.max_minutes
        late = minutes > 0 and time.monotonic() - self.started > 60 * minutes
        self.reducer.stop_requested = late or self.stop.made

    def read_controls(self, flush: bool = False) -> None:
        """Handles the control tails received so far; if another hook is due, waits for the newest one first.

        A lost GPU peer is thus noticed where the wait has a deadline, not in a copy to the host.

        Raises:
            RunError: an update is not finite and `nonfinite` is `abort`, or ranks are out of sync.
        """
        config, step = self.config, self.state.progress.step
        periods = config.log_every, config.eval_every, config.check_every, config.snapshot_every
        due = any(period and step % period == 0 for period in periods) or self.checkpoints.due(step)
        if flush or self.checkpoints.due(step):
            self.reducer.drain()  # the checkpoint holds the deltas in flight
        for control in self.reducer.received(flush=flush or due):
            self._handle(control)

    def log(self) -> None:
        """Logs the means since the last log."""
        self.metrics.log(self.state.progress)

    def evaluate(self) -> None:
        """Evaluates every theta on its task's test split; rank 0 collects and logs the results."""
        config, results = self.config, []
        if self.placement.contributes:
            for learner in self.state.learners:
                split = open_split(learner.name, "test", config.data, self.state.phi.device)
                results.append((learner.name, learner.evaluate(split.test_batches(config.batch_size))))
        for task, values in chain.from_iterable(gather(results)):
            self.metrics.log_test(self.state.progress, task, values)

    def check_phi(self) -> None:
        """Verifies that phi is identical on all ranks, every `check_every` steps and before each checkpoint.

        Raises:
            RunError: a rank's phi differs.
        """
        step = self.state.progress.step
        if step % self.config.check_every == 0 or self.checkpoints.due(step):
            check_same_bits(self.state.phi, step)

    def snapshot(self) -> None:
        """Exports the current phi, for a meta-test along meta-training (the paper's Figure 7)."""
        if self.placement.rank == 0:
            step = self.state.progress.step
            path = self.config.run_dir / SNAPSHOTS / f"phi_{step}.safetensors"
            try:
                self.folder.restore()
                path.parent.mkdir(exist_ok=True)
                export(self.config, self.state, path)
            except (OSError, RunError) as error:
                fault = f"snapshot failed: {cause_of(error)}"
                self.warn(fault, f" ({path.parent}); training continues", prefix=f"step {step}: ")

    def save(self) -> None:
        """Starts saving a checkpoint if one is due."""
        if self.checkpoints.due(self.state.progress.step):
            self.checkpoints.save(self.state, self.config)

    def _every(self, period: int, hook: Hook) -> Hook:
        """The hook, called every `period` steps; 0 disables it."""
        return lambda: hook() if period and self.state.progress.step % period == 0 else None

    def _handle(self, control: Control) -> None:
        self.metrics.add(control)
        self.state.progress.stopping |= control.stop
        names, limit = self.config.learner_names, self.config.loss_limit
        above = set((control.loss > limit).nonzero().flatten().tolist())
        for task in sorted(above - self.diverging):
            log_rank0(
                f"step {control.step}: task {names[task]} diverges: loss {control.loss[task]:.3g} exceeds "
                f"loss_limit={limit:g}; lower inner.lr or meta_lr"
            )
        self.diverging |= above
        # The steps between a non-finite update and its learner's restart are not finite either: one restart for all.
        tasks = [task for task in control.nonfinite if control.step > self.restarted.get(task, 0)]
        if tasks:
            self._restart_nonfinite(control, tasks)

    def _restart_nonfinite(self, control: Control, tasks: list[int]) -> None:
        names = ", ".join(self.config.learner_names[task] for task in tasks)
        fault = f"step {control.step}: the update of task {names} is not finite"
        if self.config.nonfinite == "abort":
            latest = f"; the latest checkpoint is in {self.checkpoints.folder}" if self.checkpoints.folder else ""
            raise RunError(
                f"{fault}; phi does not contain it. Lower inner.lr or meta_lr, check the task's data, "
                f"or set nonfinite=skip{latest}"
            )
        log_rank0(f"{fault}; its learner restarts from phi")
        self.restarted |= dict.fromkeys(tasks, self.state.progress.step)
        for task, learner in zip(self.placement.local_tasks, self.state.learners, strict=True):
            if task in tasks:
                learner.restart(self.state.phi)
                self.algorithm.begin(learner)


def export(config: TrainConfig, state: TrainState, path: Path) -> None:
    """Writes what a new task starts from to `path`: the current phi and `state.rest`, with metadata about the run.

    Raises:
        ValueError: phi is not finite.
        OSError: the file cannot be written.
    """
    step, tasks = state.progress.step, len(config.tasks)
    model = config.model.model_dump(mode="json", exclude_defaults=True)
    details = {
        "model": config.model.name,
        "width": config.model.width,
        **{key: json.dumps(value) for key, value in model.items() if key not in ("name", "width")},
        "algorithm": config.algorithm,
        "step": step,
        "tasks": tasks,
        "cumulative_inner_steps": step * len(config.learner_names),
    }
    named = {**state.rest, **state.layout.views(state.phi)}
    export_phi(path, named, {key: str(value) for key, value in details.items()})
