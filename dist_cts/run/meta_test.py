"""Meta-test (paper, section 4.2): adapts each initialization to each target (lr schedule, seeds)."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dist_cts import models
from dist_cts.atomic import remove_leftovers, replace_file
from dist_cts.checkpoint.phi import Source, load_phi, named_starts, phi_metadata, run_dir_of
from dist_cts.data.batches import CHUNK_STEPS
from dist_cts.data.datasets import DATASETS, DatasetSplit
from dist_cts.data.few_shot import FewShotSplit, draw_queries
from dist_cts.data.subset import balanced_subset
from dist_cts.data.tasks import Split, check_prepared, contents, open_split, outputs
from dist_cts.distributed.numerics import set_numerics
from dist_cts.distributed.process_group import gather, process_group, raise_on_all_ranks, select_device
from dist_cts.flat import load_named
from dist_cts.learner import TaskLearner
from dist_cts.losses import make_loss
from dist_cts.optimizer import make_schedule
from dist_cts.run import folder
from dist_cts.run.card import write_card
from dist_cts.run.console import log_rank0
from dist_cts.run.exit_codes import DONE
from dist_cts.run.memory import check_batches, check_dataset
from dist_cts.run.meta_test_config import MetaTestConfig as MetaTestConfig
from dist_cts.run.probes import Features, calibrate, head_of, linear_probe, nearest_neighbors
from dist_cts.run.report import write_report
from dist_cts.run.together import Together
from dist_cts.seeds import hashed_seed

# Keys left out of a result's identity at their defaults: results from before they existed are found.
ADDED = (
    *(
        "few_shot",
        "loss",
        "protocol",
        "data.augment",
        "data.dataset_workers",
        "inner.clip",
        "inner.schedule",
        "inner.warmup",
    ),
    *("model.args", "model.body", "model.rest", "model.head", "model.lora"),
)


@dataclass(frozen=True)
class Job:
    """One adaptation: an initialization, a target and a seed. Jobs are independent."""

    target: str
    start: str
    phi: Source | None  # for load_phi; None: random initialization
    seed: int


def meta_test(config: MetaTestConfig, phis: Mapping[str, str] | Iterable[str] = (), name: str = "meta_test") -> int:
    """Runs all unfinished jobs, on all ranks of torchrun or in one process, and reports; returns the exit code.

    Args:
        phis: source of each initialization (see `load_phi`) by name, or a list of [NAME=]SOURCE as on the command line.
        name: output folder below runs/ if `config.out` is not set and no phi is a file.

    Writes meta_test.json, .md and .png to `config.out`.

    Raises:
        ValueError, FileNotFoundError: a phi or a target is missing or does not fit the model.
    """
    phis = dict(phis) if isinstance(phis, Mapping) else named_starts(phis)
    if config.out is None:
        files = [path for path in map(Path, phis.values()) if path.is_file()]
        config = config.model_copy(update={"out": run_dir_of(files[0]) / "meta_test" if files else Path("runs") / name})
    results = run_jobs(config, phis)
    if int(os.environ.get("RANK", 0)) == 0:
        origins = {start: {"phi": phi, **phi_metadata(phi)} for start, phi in phis.items()}
        write_report(config.out, config.model_dump(mode="json"), origins, results, config.metrics())
        if (config.out / "../config.yaml").is_file():  # in a run folder, by default
            write_card(config.out.parent)
    return DONE


def run_jobs(config: MetaTestConfig, phis: Mapping[str, Source]) -> list[dict[str, Any]]:
    """The results of all jobs, in order, on every rank: target, start, seed and curve.

    With `config.out`, finished jobs are kept there and not run again.

    Raises:
        ValueError, FileNotFoundError: a phi or a target is missing or does not fit the model.
    """
    metrics, device = config.metrics(), select_device(config.device)
    set_numerics(device, config.precision, config.deterministic)
    starts = ({"random": None} if config.random else {}) | dict(phis)
    if not starts:
        raise ValueError("nothing to test: pass --phi or set random=true")
    blocks = [
        [Job(target, start, phi, seed) for seed in range(config.seeds)[first : first + config.together]]
        for target in config.target_names
        for start, phi in starts.items()
        for first in range(0, config.seeds, config.together)
    ]
    with process_group(device, 3600):
        rank, world_size, results = dist.get_rank(), dist.get_world_size(), []
        with raise_on_all_ranks():
            lock = _claim(config.out) if rank == 0 and config.out is not None else nullcontext()
        with lock, raise_on_all_ranks():
            loaded = {start: load_phi(phi, config.model) for start, phi in phis.items()}
            verified = config.data.model_copy(update={"verify": False})  # once is enough
            opened = lru_cache(maxsize=2)(partial(open_split, config=verified, device=device))  # of the current target
            without_images = config.data.model_copy(update={"cache": "stream"})  # its jobs load them, once
            for target in config.target_names:
                sizes, bf16 = {target: config.batch_size}, config.precision == "bf16"
                step = {"bf16": bf16, "sharing": 1 / config.together}
                for warning in check_batches(sizes, config.model, config.data, device, **step):
                    log_rank0(warning)
                open_split(target, "test", without_images, device)
                train = open_split(target, "train", without_images, device)
                if config.few_shot.ways:
                    check_prepared(train, target)
                learner = open_learner(config, target, train, 0, device)
                if config.protocol != "fine-tune":
                    head_of(learner)
                if config.together > 1:
                    Together([learner]).inner_step()  # raises before the first job
                for start, named in loaded.items():
                    start_from(learner, named, _described(start, phis[start]))
                learner.batches.close()
            unit = "job" if config.together == 1 else f"{config.together} jobs"
            quiet = rank > 0 or not sys.stderr.isatty()
            for block in tqdm(blocks[rank::world_size], desc="meta-test", unit=unit, disable=quiet):
                results.append(run_block(config, block, device, opened))
                for job, result in zip(block, results[-1], strict=True):
                    if not config.few_shot.ways:  # else hundreds of lines
                        metric, last = metrics[job.target], result["curve"][-1]
                        shown = metric.show(last[metric.name])
                        tqdm.write(f"{job.target}, {job.start}, seed {job.seed}: {shown}", file=sys.stderr)
        by_rank = gather(results)
    in_order = (by_rank[index % world_size][index // world_size] for index in range(len(blocks)))
    return [result for block in in_order for result in block]


def _claim(out: Path) -> IO[str]:
    """Locks the output folder and removes temporary files of killed meta-tests."""
    lock = folder.claim(out, key="out")
    (out / "jobs").mkdir(exist_ok=True)
    remove_leftovers(out / "jobs")
    return lock


def run_block(
    config: MetaTestConfig, jobs: Sequence[Job], device: torch.device, opened: Callable[[str, str], Split] | None = None
) -> list[dict]:
    """The results of jobs that differ in their seed, each read from its file if it has run on the same data."""
    data, paths, results = contents(jobs[0].target, config.data), {}, {}
    for job in jobs:
        path = paths[job.seed] = None if config.out is None else _result_path(config, job)
        if path is not None and path.exists():
            result = json.loads(path.read_text())
            if result.get("data", data) == data:
                results[job.seed] = result
    missing = [job for job in jobs if job.seed not in results]
    for job, curve in zip(missing, adapt(config, missing, device, opened) if missing else (), strict=True):
        result = {"target": job.target, "start": job.start, "seed": job.seed, "data": data, "curve": curve}
        if paths[job.seed] is not None:
            replace_file(paths[job.seed], json.dumps(result).encode())
        results[job.seed] = result
    return [results[job.seed] for job in jobs]


def adapt(
    config: MetaTestConfig, jobs: Sequence[Job], device: torch.device, opened: Callable[[str, str], Split] | None = None
) -> list[list[dict[str, float]]]:
    """Adapts one initialization to one target, with several seeds together; returns a curve per job.

    A curve has test loss and metric at `eval_points` steps. Head and running statistics are new. Head, data order and
    subset depend only on (seed, target), so they are the same for all initializations. `opened` opens the target's
    splits; jobs may share them.
    """
    opened = opened or partial(open_split, config=config.data, device=device)
    target, start, phi = jobs[0].target, jobs[0].start, jobs[0].phi
    named = None if phi is None else load_phi(phi, config.model)
    learners, tests = [], []
    for job in jobs:
        train, test = opened(target, "train"), opened(target, "test")
        learner, key = open_learner(config, target, train, job.seed, device), hashed_seed(job.seed, "meta-test")
        if named is not None:
            start_from(learner, named, _described(start, phi))
        if config.few_shot.ways:
            chosen, images = learner.batches.plan.task_at(0)
            queries = draw_queries(test.labels, chosen, config.few_shot.queries, key)
            train, test = FewShotSplit(train, chosen, images), FewShotSplit(test, chosen, queries)
        if config.protocol != "fine-tune":
            return [_probe(config, learner, train, test, key)]
        learners.append(learner)
        tests.append(test)
    return _descend(config, learners, tests)


def _descend(
    config: MetaTestConfig, learners: Sequence[TaskLearner], tests: Sequence[Split | Features | FewShotSplit]
) -> list[list[dict[str, float]]]:
    """All inner steps; a curve per learner."""
    together = Together(learners) if len(learners) > 1 else learners[0]
    schedule = make_schedule(together.optimizer, config.schedule, config.steps, config.schedule_factor)
    points = {round(config.steps * (i + 1) / config.eval_points) for i in range(config.eval_points)}
    curves: list[list[dict[str, float]]] = [[] for _ in learners]
    for step in range(1, config.steps + 1):
        together.inner_step()
        schedule.step()
        if step in points:
            if isinstance(together, Together):
                together.write_back()
            for curve, learner, test in zip(curves, learners, tests, strict=True):
                curve.append({"step": step, **learner.evaluate(test.test_batches(config.batch_size))})
    for learner in learners:
        learner.batches.close()
    return curves


def _probe(
    config: MetaTestConfig, learner: TaskLearner, train: Split | FewShotSplit, test: Split | FewShotSplit, key: int
) -> list[dict[str, float]]:
    """The curve of linear-probe or knn on the learner's features."""
    head, indices = head_of(learner), _training_images(config, train, key)
    indices = np.arange(len(train.labels)) if indices is None else indices
    calibrate(learner, len(indices), config.batch_size)
    features = Features(learner, head, train.test_batches(config.batch_size, indices))
    evaluated = Features(learner, head, test.test_batches(config.batch_size))
    learner.batches.close()
    if config.protocol == "knn":
        classes = outputs(train, learner.name)
        return [{"step": 0, **nearest_neighbors(features, evaluated, classes, learner.criterion)}]
    return _descend(config, [linear_probe(learner, head, features, key, config.batch_size)], [evaluated])[0]


def open_learner(config: MetaTestConfig, target: str, train: Split, seed: int, device: torch.device) -> TaskLearner:
    """A learner of the target with random weights.

    Raises:
        ValueError: the model does not fit the target's data.
    """
    key = hashed_seed(seed, "meta-test")
    channels_last, few_shot = config.channels_last, config.few_shot
    if few_shot.ways:
        classes = few_shot.ways
        planned = {"few_shot": few_shot, "chunk_steps": min(config.steps, CHUNK_STEPS)}
        batches = train.batches(key, config.batch_size, channels_last=channels_last, **planned)
    else:
        classes, indices = outputs(train, target), _training_images(config, train, key)
        batches = train.batches(key, config.batch_size, channels_last=channels_last, indices=indices)
    model, parts = models.build(config.model, classes, key, target)
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    loss = make_loss(config.loss_of(target))
    learner = TaskLearner(target, model, parts, batches, config.inner, criterion=loss, autocast=autocast)
    example, bf16 = train.example, config.precision == "bf16"
    if models.check_model(config.model, model, example, classes, target):
        learner.masks = models.SeededMasks(device, key, target)
    if isinstance(train, DatasetSplit):
        step = {"bf16": bf16, "sharing": 1 / config.together}
        check_dataset(target, config.batch_size, example, config.model, classes, device, **step)
    return learner


@torch.no_grad()
def start_from(learner: TaskLearner, named: Mapping[str, Tensor], source: str) -> None:
    """Starts body and rest from named tensors, with a fresh head.

    Raises:
        ValueError: they do not fit the model; names `source`.
    """
    layout = learner.flat.start_layout
    start = torch.zeros(layout.numel, dtype=layout.dtype, device=learner.theta.device)
    load_named(layout, start, models.with_adapters(learner.model.state_dict(), named, source), source)
    phi, rest = learner.flat.split_start(start)
    learner.theta.copy_(phi)
    learner.flat.start_rest(rest)


def _training_images(config: MetaTestConfig, train: Split, key: int) -> np.ndarray | None:
    """Indices of the training images of a seed; None: all."""
    return balanced_subset(train.labels, config.train_limit, key) if config.train_limit else None


def _identity(phi: Source | None) -> str | None:
    """A hash of a file's or of named tensors' content; otherwise the name of weights."""
    if isinstance(phi, Mapping):
        digest = hashlib.sha256()
        for name, tensor in sorted(phi.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
    file = Path(phi or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else phi


def _described(start: str, phi: Source) -> str:
    """For an error message."""
    return f"the initialization {start!r}" if isinstance(phi, Mapping) else str(phi)


def _result_path(config: MetaTestConfig, job: Job) -> Path:
    # Results are reused only for the same settings, dataset and bit-identical phi; but not all for the same rounding.
    left_out = {"targets", "random", "seeds", "out", "device", "deterministic", "together"}
    settings = config.model_dump(mode="json", exclude=left_out)
    settings["loss"] = config.loss_of(job.target).model_dump(mode="json")
    defaults = MetaTestConfig(targets=["any"]).model_dump(mode="json")
    for key in ADDED:
        ours, theirs, (*sections, name) = settings, defaults, key.split(".")
        for section in sections:
            ours, theirs = ours[section], theirs[section]
        if ours[name] == theirs[name]:
            del ours[name]
    if job.target in DATASETS:
        settings["content"] = contents(job.target, config.data)
    key = hashlib.sha256(json.dumps([settings, _identity(job.phi)], sort_keys=True).encode()).hexdigest()[:12]
    return config.out / "jobs" / f"{job.target}--{job.start}--{job.seed}--{key}.json"
