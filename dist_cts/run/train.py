"""The meta-training entry point, from the configuration to the exported phi."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_cts.algorithms.delay import delay_warning
from dist_cts.algorithms.table import Algorithm, make_algorithm
from dist_cts.checkpoint.manager import CheckpointManager
from dist_cts.checkpoint.none import NoCheckpoints
from dist_cts.checkpoint.settings import MAY_DIFFER
from dist_cts.distributed.balance import Costs, describe_assignment
from dist_cts.distributed.numerics import set_numerics
from dist_cts.distributed.peer_failure import liveness_checked, wait_for_gpu
from dist_cts.distributed.placement import Placement, data_group, describe_ranks
from dist_cts.distributed.process_group import (
    backend_timeout,
    check_layouts,
    check_same_bits,
    from_rank_0,
    overlapping_groups,
    process_group,
    raise_on_all_ranks,
    select_device,
)
from dist_cts.distributed.reducer import MetaReducer, collectives
from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm
from dist_cts.errors import RunError
from dist_cts.losses import make_loss
from dist_cts.meta_train import meta_train
from dist_cts.progress import Progress
from dist_cts.run import folder
from dist_cts.run.build import build_learners, choose_assignment, initial_phi
from dist_cts.run.card import write_card
from dist_cts.run.config import TrainConfig
from dist_cts.run.console import log_rank0
from dist_cts.run.costs import keep_costs, shared_costs
from dist_cts.run.exit_codes import DONE, STOPPED
from dist_cts.run.hooks import Hooks, export
from dist_cts.run.imports import check_imports
from dist_cts.run.loggers import LoggedRun, Loggers, check_loggers
from dist_cts.run.memory import check_batches
from dist_cts.run.metrics import Metrics
from dist_cts.run.shutdown import StopRequest, stop_requests
from dist_cts.state import TrainState
from dist_cts.step_graph import check_graphs, use_graphs


def train(config: TrainConfig, fresh: bool = False) -> int:
    """Meta-trains on this rank of torchrun, or in one process; resumes from the run folder's newest checkpoint.

    `fresh` starts from scratch and renames the old run folder; when torchrun restarts a fresh run, it
    resumes. Writes `run_dir`/phi.safetensors.

    Returns:
        The exit code: 0 if all M episodes are done, 75 if the run stopped on request with a checkpoint.

    Raises:
        ValueError, FileNotFoundError: the run cannot start as configured.
        RunError: the run failed.
    """
    return run(config.with_run_dir(), fresh).code


@dataclass(frozen=True)
class Trained:
    """The end of a run, the same on every rank.

    `code`: 0 if all M episodes are done, 75 if it stopped on request. `phi`: named tensors on the CPU. `history`: the
    records of metrics.jsonl, for a run without a folder.
    """

    code: int
    phi: dict[str, Tensor]
    history: list[dict[str, Any]]


def run(config: TrainConfig, fresh: bool = False) -> Trained:
    """As `train`; with `run_dir=None` the run has no folder: it reads and writes no file and cannot be resumed."""
    if config.run_dir is not None:
        with folder.writing(config.run_dir):
            (config.run_dir / folder.STOPPED).unlink(missing_ok=True)
        if not fresh:
            check_imports(config.run_dir)
    device = select_device(config.device)
    set_numerics(device, config.precision, config.deterministic)
    with (
        ExitStack() as stack,
        process_group(device, config.timeout_seconds),
        stop_requests() as stop,
        liveness_checked() as liveness,
    ):
        fresh = fresh and not folder.restarted()
        with raise_on_all_ranks():
            warnings = check_batches(
                {task.pool or task.name: config.batch_size_of(task) for task in config.tasks},
                config.model,
                config.data,
                device,
                bf16=config.precision == "bf16",
                sharing=max(1, dist.get_world_size() // len(config.learner_names)),
                at_once=config.tasks_per_episode,
            )
        for warning in warnings:
            log_rank0(warning)
        costs = shared_costs(config, device, fresh) if config.placement == "auto" else None
        progress = Progress(config.inner_steps)
        with raise_on_all_ranks():  # errors that a rank can detect without communication
            check_loggers(config.loggers)
            algorithm = make_algorithm(
                config.algorithm,
                config.method,
                inner_steps=config.inner_steps,
                meta_lr=config.meta_lr,
                seed=config.seed,
            )
            assignment = choose_assignment(config, costs, dist.get_world_size())
            placement = Placement(assignment, dist.get_world_size(), dist.get_rank())
            if config.step == "graph":
                check_graphs(algorithm, placement, device)
            learners = build_learners(config, placement, device)
            held = folder.RunFolder(config.run_dir, owner=placement.rank == 0, fresh=fresh)
            stack.callback(held.close)
        liveness.describe = lambda ranks: (
            f"{describe_ranks(assignment, config.learner_names, ranks)}, in step {progress.step},"
        )
        group = data_group(placement, backend_timeout(device, config.timeout_seconds))
        with raise_on_all_ranks():
            for learner in learners:
                learner.data_group, learner.model = group, convert_sync_batch_norm(learner.model, group)
                if config.compile:
                    learner.model.compile()
        if config.step == "graph":
            use_graphs(learners)
        flat = learners[0].flat
        check_layouts(flat.start_layout)
        phi, rest = initial_phi(config, flat, device)
        for learner in learners:
            learner.flat.start_rest(rest)
        state = TrainState(phi, flat.body_layout, learners, progress, rest=rest)
        return _run(config, state, algorithm, placement, costs, held, stop)


def _run(
    config: TrainConfig,
    state: TrainState,
    algorithm: Algorithm,
    placement: Placement,
    costs: Costs,
    held: folder.RunFolder,
    stop: StopRequest,
) -> Trained:
    """Resumes, runs Algorithm 2 with the hooks after every step, and exports phi."""
    checkpoints: CheckpointManager | NoCheckpoints = NoCheckpoints()
    if config.run_dir is not None:
        checkpoints = CheckpointManager(
            config.run_dir / "checkpoints", config.checkpoint, placement, warn=log_rank0, restore=held.restore
        )
    fixed = set() if config.outer.schedule == "constant" else {"episodes"}  # beta depends on it
    resumed = checkpoints.load_newest(state, config, tuple(set(MAY_DIFFER) - fixed))
    wait = partial(wait_for_gpu, timeout_seconds=config.timeout_seconds, stop_requested=lambda: stop.made)
    delay, device = config.method.delay, state.phi.device
    in_flight = (delay // (algorithm.period or config.inner_steps) + 1) * collectives(config.wire)
    reducer = MetaReducer(
        state.phi,
        state.learners,
        placement,
        config.reduction,
        wait,
        wire=config.wire,
        delay=delay,
        groups=overlapping_groups(device, in_flight, config.timeout_seconds),
        reduced=state.reduced,
    )
    steps = config.episodes * config.inner_steps
    with raise_on_all_ranks(), folder.writing(config.run_dir):
        if placement.rank == 0 and config.run_dir is not None:
            held.describe = lambda: (
                keep_costs(config, costs),
                folder.describe_run(config.run_dir, config, device, placement.world_size),
            )
            held.describe()
        losses = [config.loss_of(task) for task in config.tasks]  # the same for all tasks of a pool
        tasks = {name: make_loss(loss).metric for name, loss in zip(config.learner_names, losses, strict=False)}
        metrics = Metrics(held, tasks, placement, state.progress, steps, _open_loggers(config, state.progress))
    _announce(config, algorithm, placement, costs, resumed)
    with metrics:
        hooks = Hooks(config, state, algorithm, placement, reducer, metrics, checkpoints, held, stop)
        meta_train(
            state,
            algorithm,
            reducer,
            beta=config.meta_lr,
            M=config.episodes,
            K=config.inner_steps,
            outer=config.outer,
            after_step=hooks,
        )
        hooks.read_controls(flush=True)
        hooks.log()
        code = _finish(config, state, checkpoints, finished=state.progress.step == steps)
    named = {name: tensor.cpu().clone() for name, tensor in state.layout.views(state.phi).items()}
    return Trained(code, named, from_rank_0(metrics.records))


def _open_loggers(config: TrainConfig, progress: Progress) -> Loggers:
    """Those of the configuration; none on other ranks than 0, or without a run folder."""
    if config.run_dir is None or dist.get_rank() != 0:
        return Loggers()
    return Loggers(
        config.loggers, LoggedRun(config.run_dir, config.project, config.model_dump(mode="json"), progress.step)
    )


def _announce(
    config: TrainConfig, algorithm: Algorithm, placement: Placement, costs: Costs, resumed: int | None
) -> None:
    K = config.inner_steps
    evaluations = algorithm.evaluations_per_meta_update(K)
    log_rank0(f"{config.algorithm}: {evaluations:g} gradient evaluations per task and meta-update")
    if warning := algorithm.cost_note(K):
        log_rank0(f"{config.algorithm} {warning}")
    if config.algorithm == "cts" and config.inner.optimizer.startswith("adam"):
        log_rank0(
            f"warning: inner.optimizer={config.inner.optimizer}: the error of the shift is not bounded and the paper "
            "found much worse initializations (supplement A); consider inner.optimizer=sgd, which has momentum"
        )
    late, beta = config.method.delay if config.algorithm == "cts" else 0, config.meta_lr / (1 - config.outer.momentum)
    if warning := delay_warning(config.inner, beta, K, delay=late, period=algorithm.period or K):
        log_rank0(warning)
    if config.placement != "even":
        log_rank0(describe_assignment(placement.assignment, config.learner_names, costs))
    if resumed is not None:
        log_rank0(f"resuming from checkpoint at step {resumed}")


def _finish(
    config: TrainConfig, state: TrainState, checkpoints: CheckpointManager | NoCheckpoints, finished: bool
) -> int:
    """Saves the last checkpoint and exports phi, after the last episode or a stop request; returns the exit code."""
    step = state.progress.step
    check_same_bits(state.phi, step)
    saved = checkpoints.save(state, config, wait=True)
    for learner in state.learners:
        learner.batches.close()
    if config.run_dir is None:
        log_rank0(f"{'done' if finished else 'stopped'}: {step} steps")
        return DONE if finished else STOPPED
    phi = config.run_dir / "phi.safetensors"
    with raise_on_all_ranks(), folder.writing(config.run_dir):
        if dist.get_rank() == 0:
            export(config, state, phi)
            write_card(config.run_dir)
            if saved and not finished:
                (config.run_dir / folder.STOPPED).touch()
    if finished:
        log_rank0(f"done: {step} steps, phi is in {phi}")
        return DONE
    if not saved:
        raise RunError(f"stopped at step {step}, but its checkpoint was not saved: {checkpoints.fault}")
    log_rank0(f"stopped at step {step} with a checkpoint; run the same command to resume")
    return STOPPED
