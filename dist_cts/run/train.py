"""A meta-training run: its config, and what stands around the loop of meta_train.py."""

import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts import models
from dist_cts.algorithms.table import make_algorithm
from dist_cts.checkpoint.manager import Checkpoints
from dist_cts.checkpoint.phi import SNAPSHOTS, export_phi, load_phi
from dist_cts.data.batches import TaskBatches, open_task, test_batches
from dist_cts.distributed.balance import Costs, agree_on_costs, choose_assignment, describe, keep_costs
from dist_cts.distributed.peer_failure import liveness_checked
from dist_cts.distributed.placement import Placement, data_group
from dist_cts.distributed.process_group import (
    check_layouts,
    check_same_bits,
    process_group,
    raise_on_all_ranks,
    select_device,
)
from dist_cts.distributed.reducer import Control, MetaReducer
from dist_cts.distributed.sync_batch_norm import synchronise
from dist_cts.errors import RunError
from dist_cts.flat import load_named
from dist_cts.learner import Batches, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.progress import Progress
from dist_cts.run import folder as run_folder
from dist_cts.run.config import TaskConfig, TrainConfig
from dist_cts.run.console import log_rank0
from dist_cts.run.exit_codes import DONE, STOPPED
from dist_cts.run.metrics import Metrics
from dist_cts.run.shutdown import StopRequest, stop_requests


def train(config: TrainConfig, fresh: bool = False) -> int:
    """Meta-trains on this rank of torchrun (or alone), going on from what the run folder holds; gives the exit code.

    `fresh` starts anew and keeps what the folder held under another name; a restart of a fresh run goes on.

    Raises:
        ValueError, FileNotFoundError: the run cannot start as configured.
        RunError: it failed on the way.
    """
    device = select_device(config.device)
    with process_group(device, config.timeout_seconds), stop_requests() as stop, liveness_checked() as liveness:
        fresh = fresh and not run_folder.restarted()
        costs = None
        if config.placement == "auto":
            costs = agree_on_costs(config, device, partial(build_learner, config, device), fresh)
        with raise_on_all_ranks():
            run = Run(config, device, stop, fresh, costs)
        liveness.describe = run.whereabouts
        return run.train()


def build_learner(config: TrainConfig, device: torch.device, name: str, classes: int, batches: Batches) -> TaskLearner:
    """A task's learner as the config wants it, alone on its rank; its first weights follow from the seed."""
    model, head = models.build(config.model, classes, config.seed, "head", name)
    model = model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    return TaskLearner(name, model, head, batches, config.inner, reset=config.reset, autocast=autocast)


class Run:
    """This rank's share of a run: its learners, the replicated phi, and what happens after each step."""

    def __init__(
        self, config: TrainConfig, device: torch.device, stop: StopRequest, fresh: bool = False, costs: Costs = None
    ) -> None:
        """Opens and checks all that can be wrong on one rank alone; exchanges nothing with the others."""
        self.algorithm = make_algorithm(
            config.algorithm, config.method, inner_steps=config.inner_steps, meta_lr=config.meta_lr, seed=config.seed
        )
        self.names = [task.name for task in config.tasks]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"tasks: a name stands twice in {', '.join(self.names)}")
        self.config, self.device, self.stop, self.folder = config, device, stop, config.run_dir
        self.progress = Progress(config.inner_steps)
        self.diverging: set[int] = set()  # tasks already reported
        assignment, self.costs = choose_assignment(config, costs, dist.get_world_size()), costs
        self.placement = Placement(assignment, dist.get_world_size(), dist.get_rank())
        self.learners = [self._learner(config.tasks[task]) for task in self.placement.local_tasks]
        if self.placement.rank == 0:
            with run_folder.written(self.folder):
                self.lock = run_folder.lock(self.folder, fresh)
                keep_costs(self.folder, costs)

    def train(self) -> int:
        """Resumes, runs the loop, exports phi; 0, or 75 when it was asked to stop."""
        config, placement = self.config, self.placement
        self._join_data_groups()
        self.layout = self.learners[0].flat.body_layout
        check_layouts(self.layout)
        self.phi = self._phi_zero()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint, placement, warn=log_rank0)
        resumed = self.checkpoints.load_newest(self.phi, self.layout, self.learners, config)
        self.progress.step = resumed or 0
        for learner in self.learners:
            learner.batches.seek(self.progress.step)
        self.reducer = MetaReducer(self.phi, self.learners, placement, config.reduction)
        steps = config.episodes * config.inner_steps
        with raise_on_all_ranks(), run_folder.written(self.folder):
            if placement.rank == 0:
                run_folder.describe(self.folder, config, self.device, placement.world_size)
            self.metrics = Metrics(self.folder, self.names, placement, self.progress, steps)
        evaluations = self.algorithm.evaluations_per_meta_update(config.inner_steps)
        log_rank0(f"{config.algorithm}: {evaluations:g} gradient evaluations a task for each update of phi")
        if note := self.algorithm.cost_note(config.inner_steps):
            log_rank0(f"{config.algorithm} {note}")
        if config.placement != "even":
            log_rank0(describe(placement.assignment, self.names, self.costs))
        if resumed is not None:
            log_rank0(f"going on from the checkpoint of step {resumed}")
        self.started = time.monotonic()
        with closing(self.metrics):
            meta_train(
                self.phi,
                self.learners,
                self.algorithm,
                self.reducer,
                beta=config.meta_lr,
                M=config.episodes,
                K=config.inner_steps,
                progress=self.progress,
                after_step=self.after_step,
            )
            return self._end(finished=self.progress.step == steps)

    def after_step(self) -> None:
        """Obeys the control tail, logs, tests, saves: whatever is decided here, all ranks decide at the same step."""
        config, step = self.config, self.progress.step
        late = config.max_minutes and time.monotonic() - self.started > 60 * config.max_minutes
        self.reducer.stop_requested = bool(late) or self.stop.made
        log, save = step % config.log_every == 0, self.checkpoints.due(step)
        for control in self.reducer.received(flush=log or save):
            self._handle_control(control)
        if log:
            self.metrics.log(self.progress)
        if config.eval_every and step % config.eval_every == 0:
            self._test()
        if save or step % config.check_every == 0:
            check_same_bits(self.phi, step)
        if config.snapshot_every and step % config.snapshot_every == 0:  # before the checkpoint, so that none is lost
            self._snapshot()
        if save:
            self._save(wait=False)

    def whereabouts(self, ranks: list[int]) -> str:
        """Ranks with their tasks, and the step that this rank is at: `rank 1 (task b), in step 17`."""
        assignment = list(zip(self.names, self.placement.assignment, strict=True))
        tasks = {rank: ", ".join(name for name, seated in assignment if rank in seated) for rank in ranks}
        return f"{', '.join(f'rank {rank} (task {tasks[rank]})' for rank in ranks)}, in step {self.progress.step},"

    def _handle_control(self, control: Control) -> None:
        self.metrics.add(control)
        self.progress.stopping |= control.stop
        limit, beyond = self.config.loss_limit, (control.loss > self.config.loss_limit).nonzero().flatten().tolist()
        for task in set(beyond) - self.diverging:
            log_rank0(
                f"step {control.step}: task {self.names[task]} diverges, its loss is {control.loss[task]:.3g} "
                f"(loss_limit={limit:g}): lower inner.lr or meta_lr"
            )
        self.diverging.update(beyond)
        if not control.nonfinite:
            return
        names = ", ".join(self.names[task] for task in control.nonfinite)
        fault = f"step {control.step}: the update of task {names} is not finite"
        if self.config.nonfinite == "abort":
            raise RunError(
                f"{fault}; phi does not contain it. Lower inner.lr or meta_lr, look at that task's images, "
                "or set nonfinite=skip; the newest checkpoint is in " + str(self.folder / "checkpoints")
            )
        log_rank0(f"{fault}; that learner starts again from phi")
        for task, learner in zip(self.placement.local_tasks, self.learners, strict=True):
            if task in control.nonfinite:
                learner.restart(self.phi)
                self.algorithm.begin(learner)

    def _learner(self, task: TaskConfig) -> TaskLearner:
        config, placement = self.config, self.placement
        folder = config.data.root / task.name
        source = open_task(folder, "train", config.data, self.device)
        manifest = source.manifest
        if task.classes not in (None, manifest.classes):
            raise ValueError(f"task {task.name}: {task.classes} classes configured, {folder} has {manifest.classes}")
        batches = TaskBatches(
            source,
            config.seed,
            task.batch_size or config.batch_size,
            config.data,
            data_rank=placement.data_rank,
            data_ranks=placement.data_ranks,
            channels_last=config.channels_last,
        )
        return build_learner(config, self.device, task.name, manifest.classes, batches)

    def _join_data_groups(self) -> None:
        group = data_group(self.placement, self.config.timeout_seconds)
        for learner in self.learners:
            learner.data_group = group
            learner.model = synchronise(learner.model, group)

    def _phi_zero(self) -> Tensor:
        """phi_0 [N] from the seed or a file, equal on all ranks from step 0 (the released code's ranks start apart)."""
        config = self.config
        phi = torch.zeros(self.layout.numel, dtype=self.layout.dtype, device=self.device)
        with raise_on_all_ranks():
            if self.placement.rank == 0 and config.init is not None:
                load_named(self.layout, phi, load_phi(config.init), config.init)
            elif self.placement.rank == 0:
                load_named(self.layout, phi, models.build(config.model, 1, config.seed, "phi")[0].state_dict())
        dist.broadcast(phi, 0)
        return phi

    def _test(self) -> None:
        """Every theta on its task's whole test split; the results meet on rank 0."""
        results = []
        if self.placement.contributes:
            for learner in self.learners:
                source = open_task(self.config.data.root / learner.name, "test", self.config.data, self.device)
                batches = test_batches(source, self.config.batch_size, self.config.data)
                results.append((learner.name, *learner.evaluate(batches)))
        gathered: list[list] = [[] for _ in range(self.placement.world_size)]
        dist.all_gather_object(gathered, results)
        for result in (result for results in gathered for result in results):
            self.metrics.log_test(self.progress, *result)

    def _snapshot(self) -> None:
        """phi as it is now, for a meta-test of how far meta-learning has come (the paper's Figure 7)."""
        if self.placement.rank == 0:
            path = self.folder / SNAPSHOTS / f"phi_{self.progress.step}.safetensors"
            try:
                path.parent.mkdir(exist_ok=True)
                self._export(path)
            except OSError as error:
                log_rank0(f"no snapshot of step {self.progress.step}: {error}; training goes on")

    def _export(self, path: Path) -> None:
        config, step = self.config, self.progress.step
        details = {
            "model": config.model.name,
            "width": config.model.width,
            "algorithm": config.algorithm,
            "step": step,
            "tasks": len(self.names),
            "cumulative_inner_steps": step * len(self.names),
        }
        named = {name: view.contiguous() for name, view in self.layout.views(self.phi.cpu()).items()}
        export_phi(path, named, {key: str(value) for key, value in details.items()})

    def _save(self, wait: bool) -> bool:
        return self.checkpoints.save(self.progress.step, self.phi, self.layout, self.learners, self.config, wait=wait)

    def _end(self, finished: bool) -> int:
        for control in self.reducer.received(flush=True):
            self._handle_control(control)
        self.metrics.log(self.progress)
        check_same_bits(self.phi, self.progress.step)
        saved = self._save(wait=True)
        for learner in self.learners:
            learner.batches.close()
        phi = self.folder / "phi.safetensors"
        with raise_on_all_ranks(), run_folder.written(self.folder):
            if self.placement.rank == 0:
                self._export(phi)
        if finished:
            log_rank0(f"done: {self.progress.step} steps, phi is in {phi}")
        elif saved:
            log_rank0(f"stopped at step {self.progress.step}, a checkpoint is written: the same command goes on")
        if not finished and not saved:
            raise RunError(f"stopped at step {self.progress.step}, but no checkpoint of it could be written")
        return DONE if finished else STOPPED
