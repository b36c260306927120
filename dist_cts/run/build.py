"""Builds the parts of a run from its configuration: placement, learners, phi_0."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_cts import models
from dist_cts.checkpoint.phi import load_phi
from dist_cts.data.datasets import DATASETS, DatasetSplit
from dist_cts.data.tasks import Split, check_prepared, open_split, outputs
from dist_cts.distributed.balance import Costs, named_assignment, plan
from dist_cts.distributed.placement import Assignment, Placement, even_assignment
from dist_cts.distributed.process_group import raise_on_all_ranks
from dist_cts.flat import FlatParams, Parts, load_named
from dist_cts.learner import Batches, TaskLearner
from dist_cts.losses import make_loss
from dist_cts.optimizer import inner_schedule
from dist_cts.pool import PoolBatches, PoolLearner, share
from dist_cts.run.config import TaskConfig, TrainConfig
from dist_cts.run.memory import check_dataset
from dist_cts.seeds import hashed_seed


def choose_assignment(config: TrainConfig, costs: Costs, world_size: int) -> Assignment:
    """The ranks of every task according to `config.placement`; `costs`: measured step times, for `auto`.

    Raises:
        ValueError: the tasks do not fit the ranks.
    """
    names = config.learner_names
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
    opened = _open_pool if config.tasks_per_episode else _open_learner
    learners = [opened(config, index, placement, device) for index in placement.local_tasks]
    for learner in learners[1:]:  # other ranks' are compared by check_layouts
        for ours, first in zip(learner.flat.start_layout.slots, learners[0].flat.start_layout.slots, strict=True):
            if ours != first:
                raise ValueError(
                    f"phi covers {ours.name}, which is {list(first.shape)} in task {learners[0].name} but "
                    f"{list(ours.shape)} in task {learner.name}; leave it out by model.body"
                )
    return learners


def build_learner(
    config: TrainConfig,
    device: torch.device,
    task: TaskConfig,
    classes: int,
    batches: Batches,
    kind: Callable[..., TaskLearner] = TaskLearner,
) -> TaskLearner:
    """One task's learner on the given batches; its initial weights depend only on the seed and the task's name."""
    model, head = _model(config, classes, task.name)
    model = model.to(device)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    return kind(
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


def _model(config: TrainConfig, classes: int, task: str) -> tuple[nn.Module, Parts]:
    """A task's model with its initial weights, and what phi leaves out."""
    model, parts = models.build(config.model, classes, config.seed, "head", task)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(memory_format=memory_format), parts


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


def _open_learner(config: TrainConfig, index: int, placement: Placement, device: torch.device) -> TaskLearner:
    task = config.tasks[index]
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
    _check(config, learner, split, classes, placement, device)
    _check_memory(config, task, split, classes, placement, device)
    return learner


def _open_pool(config: TrainConfig, index: int, placement: Placement, device: torch.device) -> TaskLearner:
    """The learner of this number: the batches of every task of its share can be opened and fit one model."""
    tasks = [config.tasks[task] for task in share(len(config.tasks), config.tasks_per_episode, index)]
    without_images, fingerprints = config.data.model_copy(update={"cache": "stream"}), []
    verified = config.data.model_copy(update={"verify": False})
    for task in tasks:
        split = open_split(task.name, "train", without_images, device)
        fingerprints.append(getattr(split, "fingerprint", ""))
        classes = outputs(split, task.name, task.classes)
        if task is tasks[0]:
            first = split, classes
        elif classes != first[1]:
            raise ValueError(
                f"tasks_per_episode: a learner's tasks share one head, but {tasks[0].name} has {first[1]} classes and "
                f"{task.name} {classes}; leave it out, or choose tasks of equally many classes"
            )
        _check_memory(config, task, split, classes, placement, device)

    def opened(task: TaskConfig) -> Batches:
        return open_split(task.name, "train", verified, device).batches(
            config.seed,
            config.batch_size_of(task),
            data_rank=placement.data_rank,
            data_ranks=placement.data_ranks,
            channels_last=config.channels_last,
        )

    def start(number: int) -> Tensor:
        flat = FlatParams(*_model(config, classes, tasks[number].name))
        return flat.vector[flat.body_layout.numel :]

    batches = PoolBatches(
        [partial(opened, task) for task in tasks], fingerprints, config.seed, index, config.inner_steps
    )
    name = config.learner_names[index]
    kind = partial(PoolLearner, start=start)
    learner = build_learner(config, device, tasks[0].model_copy(update={"name": name}), classes, batches, kind)
    _check(config, learner, first[0], classes, placement, device)
    return learner


def _check(
    config: TrainConfig, learner: TaskLearner, split: Split, classes: int, placement: Placement, device: torch.device
) -> None:
    """Tries the model on the data; seeds its dropout, if it has any."""
    if models.check_model(config.model, learner.model, split.example, classes, learner.name):
        if config.step == "graph" or config.compile:
            key = "step=graph" if config.step == "graph" else "compile=true"
            raise ValueError(
                f"{key}: {config.model.name} draws dropout masks, which would not follow the seed; unset it"
            )
        learner.masks = models.SeededMasks(
            device, config.seed, learner.name, data_rank=placement.data_rank, data_ranks=placement.data_ranks
        )


def _check_memory(
    config: TrainConfig, task: TaskConfig, split: Split, classes: int, placement: Placement, device: torch.device
) -> None:
    """As `check_batches` does for prepared tasks."""
    if isinstance(split, DatasetSplit):
        size, bf16 = config.batch_size_of(task), config.precision == "bf16"
        check_dataset(
            task.name, size, split.example, config.model, classes, device, bf16=bf16, sharing=placement.data_ranks
        )
