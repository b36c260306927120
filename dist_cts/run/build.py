"""Builds the parts of a run from its configuration: placement, learners, phi_0."""

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts import models
from dist_cts.checkpoint.phi import load_phi
from dist_cts.data.datasets import DATASETS
from dist_cts.data.tasks import check_prepared, open_split, outputs
from dist_cts.distributed.balance import Costs, named_assignment, plan
from dist_cts.distributed.placement import Assignment, Placement, even_assignment
from dist_cts.distributed.process_group import raise_on_all_ranks
from dist_cts.flat import FlatParams, load_named
from dist_cts.learner import Batches, TaskLearner
from dist_cts.losses import make_loss
from dist_cts.optimizer import inner_schedule
from dist_cts.run.config import TaskConfig, TrainConfig
from dist_cts.seeds import hashed_seed


def choose_assignment(config: TrainConfig, costs: Costs, world_size: int) -> Assignment:
    """The ranks of every task according to `config.placement`; `costs`: measured step times, for `auto`.

    Raises:
        ValueError: the tasks do not fit the ranks.
    """
    names = config.task_names
    if config.placement == "even":
        return even_assignment(len(names), world_size)
    if config.placement != "auto":
        return named_assignment(config.placement, names, world_size)
    # iMAML's Hessian-vector products need the full batch on one rank; a batch size of 1 prevents sharing.
    sizes = [1 if config.algorithm == "imaml" else config.batch_size_of(task) for task in config.tasks]
    return plan([costs[name] for name in names], world_size, sizes)


def build_learners(config: TrainConfig, placement: Placement, device: torch.device) -> list[TaskLearner]:
    """This rank's learners in task order, each with its task's training images; no communication.

    Raises:
        ValueError, FileNotFoundError: a prepared task is missing, damaged, or does not fit the configuration.
    """
    learners = [_open_learner(config, config.tasks[task], placement, device) for task in placement.local_tasks]
    for learner in learners[1:]:  # other ranks' are compared by check_layouts
        for ours, first in zip(learner.flat.start_layout.slots, learners[0].flat.start_layout.slots, strict=True):
            if ours != first:
                raise ValueError(
                    f"phi covers {ours.name}, which is {list(first.shape)} in task {learners[0].name} but "
                    f"{list(ours.shape)} in task {learner.name}; leave it out by model.body"
                )
    return learners


def build_learner(
    config: TrainConfig, device: torch.device, task: TaskConfig, classes: int, batches: Batches
) -> TaskLearner:
    """One task's learner on the given batches; its initial weights depend only on the seed and the task's name."""
    model, head = models.build(config.model, classes, config.seed, "head", task.name)
    model = model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    return TaskLearner(
        task.name,
        model,
        head,
        batches,
        config.inner,
        reset=config.reset,
        schedule=inner_schedule(config.inner, config.inner_steps),
        criterion=make_loss(config.loss_of(task)),
        autocast=autocast,
    )


def initial_phi(config: TrainConfig, flat: FlatParams, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """phi_0 [N] and what it leaves out besides the heads, by name, for the model of any learner's `flat`.

    From `init` or the seed: built on rank 0 and broadcast, so that all is bit-identical on all ranks.

    Raises:
        ValueError, OSError: `init` is missing, damaged, or does not fit the model.
    """
    layout = flat.start_layout
    start = torch.zeros(layout.numel, dtype=layout.dtype, device=device)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            named = models.build(config.model, flat.parts.classes, config.seed, "phi")[0].state_dict()
            if config.init is not None:
                named = models.with_adapters(named, load_phi(config.init, config.model), config.init)
            load_named(layout, start, named, config.init or "the model")
    dist.broadcast(start, 0)
    return flat.split_start(start)


def _open_learner(config: TrainConfig, task: TaskConfig, placement: Placement, device: torch.device) -> TaskLearner:
    split = open_split(task.pool or task.name, "train", config.data, device)
    pool = {} if not config.few_shot.ways else {"few_shot": config.few_shot, "inner_steps": config.inner_steps}
    if pool:
        check_prepared(split, task.pool)
    if config.eval_every and task.name in DATASETS:
        open_split(task.name, "test", config.data, device)  # if it is missing, before the first step
    batches = split.batches(
        hashed_seed(config.seed, task.name) if pool else config.seed,  # every few-shot task draws its own episodes
        config.batch_size_of(task),
        data_rank=placement.data_rank,
        data_ranks=placement.data_ranks,
        channels_last=config.channels_last,
        **pool,
    )
    classes = config.few_shot.ways if pool else outputs(split, task.name, task.classes)
    learner = build_learner(config, device, task, classes, batches)
    if models.check_model(config.model, learner.model, split.example, classes, task.name):
        if config.step == "graph" or config.compile:
            key = "step=graph" if config.step == "graph" else "compile=true"
            raise ValueError(
                f"{key}: {config.model.name} draws dropout masks, which would not follow the seed; unset it"
            )
        learner.masks = models.SeededMasks(
            device, config.seed, task.name, data_rank=placement.data_rank, data_ranks=placement.data_ranks
        )
    return learner
