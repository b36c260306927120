"""Measured step times of the tasks, for `placement: auto`; kept in the run folder for a resume."""

import json

import torch
import torch.distributed as dist

from dist_cts.atomic import replace_file
from dist_cts.data.beton import read_manifest
from dist_cts.data.datasets import DATASETS
from dist_cts.data.tasks import open_split, outputs
from dist_cts.distributed.balance import Costs
from dist_cts.distributed.process_group import from_rank_0, raise_on_all_ranks
from dist_cts.learner import Batch, TaskLearner
from dist_cts.run.build import build_learner
from dist_cts.run.config import TrainConfig

STEP_SECONDS = "step_seconds.json"  # in the run folder


def shared_costs(config: TrainConfig, device: torch.device, fresh: bool = False) -> Costs:
    """Each task's step time on one rank, measured by rank 0 on random images or on the first batch of a dataset.

    A resumed run reuses the times in its run folder: with the same number of ranks it gets the same placement and is
    bit-identical. `fresh` measures again.

    Raises:
        ValueError, FileNotFoundError: a prepared task is missing.
    """
    costs: dict[str, float] = {}
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            file = config.run_dir and config.run_dir / STEP_SECONDS
            if file is not None and file.exists() and not fresh:
                costs = json.loads(file.read_text())
            if costs.keys() != set(config.task_names):
                costs = _measure(config, device)
    return from_rank_0(costs)


def keep_costs(config: TrainConfig, costs: Costs) -> None:
    """Writes the measured times, if any, into the run folder."""
    if costs is not None:
        replace_file(config.run_dir / STEP_SECONDS, (json.dumps(costs, indent=1) + "\n").encode())


class RepeatedBatch:
    """The same batch at every step, for timing."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.wait_seconds = batch, 0.0

    def next(self) -> Batch:
        """The batch."""
        return self.batch


def random_batch(pixels: int, batch_size: int, device: torch.device, channels_last: bool = False) -> RepeatedBatch:
    """Random images, float32 [B, 3, P, P], with labels 0, int64 [B]."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(batch_size, 3, pixels, pixels, device=device).contiguous(memory_format=memory_format)
    return RepeatedBatch((images, torch.zeros(batch_size, dtype=torch.int64, device=device)))


def step_seconds(learner: TaskLearner) -> float:
    """The median time of an inner step over half a second of steps, after a warm-up."""
    from torch.utils.benchmark import Timer  # also waits for the device

    timer = Timer("learner.inner_step()", globals={"learner": learner}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def _measure(config: TrainConfig, device: torch.device) -> dict[str, float]:
    costs, measured = {}, {}
    for task in config.tasks:
        if task.name in DATASETS:
            split = open_split(task.name, "train", config.data, device)
            batches = split.batches(config.seed, config.batch_size_of(task), channels_last=config.channels_last)
            batch = RepeatedBatch(batches.next())
            batches.close()
            costs[task.name] = step_seconds(
                build_learner(config, device, task, outputs(split, task.name, task.classes), batch)
            )
            continue
        manifest = read_manifest(config.data.root / (task.pool or task.name) / "train")
        shape = manifest.pixels, config.batch_size_of(task)
        if shape not in measured:
            batches = random_batch(*shape, device, config.channels_last)
            measured[shape] = step_seconds(build_learner(config, device, task, manifest.classes, batches))
        costs[task.name] = measured[shape]
    return costs
