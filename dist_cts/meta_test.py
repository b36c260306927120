"""Meta-test (paper section 4.2): adapt each start to each target task, several seeds, and report test accuracy."""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from scipy import stats
from tqdm import tqdm

from dist_cts import models
from dist_cts.checkpoint.phi import load_phi, phi_metadata
from dist_cts.config import Config
from dist_cts.data.batches import DataConfig, TaskBatches, open_task, test_batches
from dist_cts.distributed.process_group import process_group, raise_on_all_ranks, select_device
from dist_cts.flat import FlatParams, load_named
from dist_cts.learner import InnerConfig, TaskLearner, make_schedule
from dist_cts.models import ModelConfig
from dist_cts.run.exit_codes import DONE
from dist_cts.seeds import hashed_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class MetaTestConfig(Config):
    """How starts are adapted and compared; the defaults are the paper's section 4.2."""

    targets: list[str] = Field(min_length=1, description="prepared tasks that meta-training has not seen")
    random: bool = Field(True, description="compare with random initialization")
    seeds: int = Field(5, gt=0, description="runs of every start on every target")
    steps: int = Field(1000, gt=0, description="inner steps from the start")
    batch_size: int = Field(128, gt=0)
    schedule: Literal["multi-step", "cosine", "constant"] = Field(
        "multi-step", description="multi-step: lr x 0.2 at 40, 70 and 90 % of the steps"
    )
    train_limit: int = Field(0, ge=0, description="so many training images a target, equal classes; 0: all")
    eval_points: int = Field(5, gt=0, description="tests along the steps, evenly spread, the last at the end")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    out: Path | None = Field(None, description="folder of the results; default: meta_test beside the first phi")
    inner: InnerConfig = InnerConfig(optimizer="nesterov", lr=0.1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()


@dataclass(frozen=True)
class Job:
    """One adaptation: a start on a target with a seed; independent of all others."""

    target: str
    start: str
    phi: str | None  # what load_phi takes; None: random initialization
    seed: int


def meta_test(config: MetaTestConfig, phis: dict[str, str]) -> int:
    """Runs every job that is not done yet, on all ranks of torchrun or alone, and reports; gives the exit code.

    `phis`: what `load_phi` takes, for every start's name. Writes meta_test.json, .md and .png to `config.out`.

    Raises:
        ValueError, FileNotFoundError: a phi or a target is missing or does not fit the model.
    """
    device = select_device(config.device)
    starts = ({"random": None} if config.random else {}) | phis
    if not starts:
        raise ValueError("nothing to test: give --phi, or random=true")
    jobs = [
        Job(target, start, phi, seed)
        for target in config.targets
        for start, phi in starts.items()
        for seed in range(config.seeds)
    ]
    folder = config.out
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    with process_group(device, 3600):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = jobs[rank::world_size]
        with raise_on_all_ranks():
            for target in config.targets:
                open_task(config.data.root / target, "test", config.data, device)
            layout = FlatParams(*models.build(config.model, 1, "fits")).body_layout
            for phi in phis.values():
                load_named(layout, torch.zeros(layout.numel), load_phi(phi), phi)
            for job in tqdm(mine, desc="meta-test", unit="job", disable=rank > 0 or not sys.stderr.isatty()):
                accuracy = run_once(config, job, device)["curve"][-1]["accuracy"]
                tqdm.write(f"{job.target}, {job.start}, seed {job.seed}: {100 * accuracy:.1f} %", file=sys.stderr)
        dist.barrier()
        if rank == 0:
            report(config, phis, [run_once(config, job, device) for job in jobs])
        dist.barrier()
    return DONE


def run_once(config: MetaTestConfig, job: Job, device: torch.device) -> dict:
    """A job's result, which is kept: where the same job's result is there, nothing is done again."""
    path = _result_path(config, job)
    if path.exists():
        return json.loads(path.read_text())
    curve = adapt(config, job, device)
    result = {"target": job.target, "start": job.start, "seed": job.seed, "curve": curve}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)
    return result


def adapt(config: MetaTestConfig, job: Job, device: torch.device) -> list[dict[str, float]]:
    """Adapts one start to one target; its test loss and accuracy (0 .. 1) at `eval_points` steps.

    Head and running statistics are fresh; head, batches and subset follow from (seed, target), so that all starts of a
    seed see the same ones.
    """
    folder = config.data.root / job.target
    train = open_task(folder, "train", config.data, device)
    test = open_task(folder, "test", config.data, device)
    key = hashed_seed(job.seed, "meta-test")
    indices = balanced_subset(train.labels, config.train_limit, key) if config.train_limit else None
    batches = TaskBatches(train, key, config.batch_size, config.data, indices=indices)
    model, head = models.build(config.model, train.manifest.classes, key, job.target)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    learner = TaskLearner(job.target, model.to(device), head, batches, config.inner, autocast=autocast)
    if job.phi is not None:
        load_named(learner.flat.body_layout, learner.theta, load_phi(job.phi), job.phi)
    schedule = make_schedule(learner.optimizer, config.schedule, config.steps)
    points = {round(config.steps * (i + 1) / config.eval_points) for i in range(config.eval_points)}
    curve = []
    for step in range(1, config.steps + 1):
        learner.inner_step()
        schedule.step()
        if step in points:
            loss, accuracy = learner.evaluate(test_batches(test, config.batch_size, config.data))
            curve.append({"step": step, "loss": loss, "accuracy": accuracy})
    batches.close()
    return curve


def balanced_subset(labels: np.ndarray, size: int, *seed: int | str) -> np.ndarray:
    """`size` indices into labels [N], spread evenly over the classes, drawn from the seed.

    Raises:
        ValueError: fewer than `size` images.
    """
    if size > len(labels):
        raise ValueError(f"train_limit={size}: the task has {len(labels)} training images")
    order = np.random.default_rng(hashed_seed(*seed, "subset")).permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)  # an image's place among its class, in the drawn order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = np.arange(len(members))
    # First every class's first image, then every class's second, ...; the drawn order breaks ties.
    return np.sort(order[np.argsort(ranks[order], kind="stable")[:size]])


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student t); the half width of one value is not a number."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def report(config: MetaTestConfig, phis: dict[str, str], results: list[dict]) -> None:
    """Writes meta_test.json, the Markdown table and the bar plot; prints the table."""
    starts = list(dict.fromkeys(result["start"] for result in results))
    summary: dict[str, dict[str, dict]] = {start: {} for start in starts}
    for start in starts:
        for target in config.targets:
            curves = [r["curve"] for r in results if (r["start"], r["target"]) == (start, target)]
            last = [100 * curve[-1]["accuracy"] for curve in curves]
            best = [100 * max(point["accuracy"] for point in curve) for curve in curves]
            (mean, half), (best_mean, best_half) = interval(last), interval(best)
            summary[start][target] = {"accuracy": mean, "ci95": half, "best": best_mean, "best_ci95": best_half}
            summary[start][target] |= {"seeds": last, "best_seeds": best}
    table = markdown(summary, config.targets)
    if config.eval_points > 1:
        best_table = markdown(summary, config.targets, "best", "best_ci95")
        table += f"\nThe best of {config.eval_points} points of each curve, chosen by the test images:\n\n{best_table}"
    origins = {start: {"phi": phi, **phi_metadata(phi)} for start, phi in phis.items()}
    document = {"config": config.model_dump(mode="json"), "starts": origins, "summary": summary, "results": results}
    (config.out / "meta_test.json").write_text(json.dumps(document, indent=1) + "\n")
    (config.out / "meta_test.md").write_text(table)
    plot(summary, config.out / "meta_test.png")
    print(f"Test accuracy in % after {config.steps} steps, mean ± 95 % interval over {config.seeds} seeds:\n\n{table}")
    print(f"Results: {config.out / 'meta_test.json'}, .md and .png")


def markdown(
    summary: dict[str, dict[str, dict]], targets: list[str], value: str = "accuracy", interval: str = "ci95"
) -> str:
    """A table like the paper's Table 1: a row a start, a column a target and their average, the best in bold."""
    means = {start: [row[target][value] for target in targets] for start, row in summary.items()}
    best = [max(column) for column in zip(*means.values(), strict=True)]
    average = {start: float(np.mean(values)) for start, values in means.items()}
    lines = ["| start | " + " | ".join([*targets, "average"]) + " |", "|---" * (len(targets) + 2) + "|"]
    for start, row in summary.items():
        cells = []
        for target, top in zip(targets, best, strict=True):
            mean, half = row[target][value], row[target][interval]
            text = f"{mean:.2f}" if np.isnan(half) else f"{mean:.2f} ± {half:.2f}"
            cells.append(f"**{text}**" if mean == top else text)
        text = f"{average[start]:.2f}"
        cells.append(f"**{text}**" if average[start] == max(average.values()) else text)
        lines.append("| " + " | ".join([start, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, dict[str, dict]], path: Path) -> None:
    """Writes the bar plot of `draw_bars`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = len(next(iter(summary.values())))
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * targets, 3.4), layout="constrained")
    draw_bars(axes, summary)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def start_colours(starts: Iterable[str]) -> dict[str, str]:
    """A colour for every start, apart for colour-blind eyes too (Okabe and Ito); random initialization is grey."""
    palette = itertools.cycle(["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"])
    return {start: "#999999" if start == "random" else next(palette) for start in starts}


def draw_bars(axes: "Axes", summary: dict[str, dict[str, dict]]) -> None:
    """A group of bars for every target, a bar for every start, with 95 % intervals."""
    colours = start_colours(summary)
    targets = list(next(iter(summary.values())))
    width = 0.8 / len(summary)
    for index, (start, row) in enumerate(summary.items()):
        place = np.arange(len(targets)) + (index - (len(summary) - 1) / 2) * width
        halves = np.nan_to_num([row[target]["ci95"] for target in targets])
        heights = np.array([row[target]["accuracy"] for target in targets])
        whiskers = np.minimum(halves, heights), np.minimum(halves, 100 - heights)  # within 0 to 100 %
        axes.bar(place, heights, 0.9 * width, yerr=whiskers, capsize=3, label=start, color=colours[start])
    axes.set_xticks(np.arange(len(targets)), targets)
    axes.set_ylabel("test accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _result_path(config: MetaTestConfig, job: Job) -> Path:
    # A result is found again only by a job of the same settings and the same phi, bit for bit.
    settings = config.model_dump(mode="json", exclude={"targets", "random", "seeds", "out", "device"})
    file = Path(job.phi or "")
    phi = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else job.phi
    key = hashlib.sha256(json.dumps([settings, phi], sort_keys=True).encode()).hexdigest()[:12]
    return config.out / "jobs" / f"{job.target}--{job.start}--{job.seed}--{key}.json"
