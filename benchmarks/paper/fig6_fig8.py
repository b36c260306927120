"""Figures 6 and 8: every method at equal cumulative inner steps, on real tasks at a size that you choose.

Each method's beta is tuned first, then the runs and their meta-test follow; a call that was interrupted goes on.

python benchmarks/paper/fig6_fig8.py --workers 2                     (two CPU cores; 1 to 1.5 hours)
python benchmarks/paper/fig6_fig8.py --work runs/large --steps 20000 --tune-steps 2000 --K 10 100 1000 batch_size=128
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import safetensors
import torch
import torch.distributed as dist
import yaml
from matplotlib.axes import Axes

from benchmarks.paper.figures import BLUE, GREEN, ORANGE, PURPLE, RED, RESULTS, SKY, save
from benchmarks.runs import ROOT, command, task_average_loss
from dist_cts.config import load
from dist_cts.errors import RunError
from dist_cts.run.config import TrainConfig
from dist_cts.run.exit_codes import STOPPED
from dist_cts.run.report import interval
from dist_cts.run.train import train

GREY, YELLOW, BLACK = "#999999", "#F0E442", "#000000"
# Where the search for beta begins, at K = 10, 100 and 1000: Table 3, and its rows' neighbours for what it leaves out.
TABLE_3 = {
    "cts": (1, 0.1, 0.01),
    "no_shifting": (1, 0.1, 0.01),
    "random_shifting": (1, 0.1, 0.01),
    "reptile": (5, 2, 1),
    "fomaml": (0.5, 0.2, 0.1),
    "fomaml++": (0.5, 0.2, 0.1),
    "imaml": (0.5, 0.2, 0.1),
    "leap": (0.1, 0.1, 0.1),
}
LOOKS = {
    "cts": ("Ours (cts)", BLUE),
    "accurate": ("Ours Accurate", SKY),
    "reptile": ("Reptile", RED),
    "no_shifting": ("No Shifting", GREEN),
    "random_shifting": ("Random Shifting", PURPLE),
    "leap": ("Leap", ORANGE),
    "fomaml": ("FOMAML", YELLOW),
    "fomaml++": ("FOMAML++", "#B8A000"),
    "imaml": ("iMAML", "#8C564B"),
    "mtl": ("MTL", "#555555"),
    "single": ("one task", "#777777"),
    "random": ("random init.", GREY),
}
COMPARED = ("cts", "reptile", "no_shifting", "random_shifting")  # several meta-training seeds
SWEPT = ("cts", "reptile", "fomaml", "leap")  # accuracy against K
STEEP = {"imaml": ("method.imaml.lam=2",)}  # lambda has to exceed the most negative curvature


@dataclass(frozen=True)
class Run:
    """One meta-training; its name is its folder's and its start's in the meta-test."""

    method: str
    K: int
    beta: float
    seed: int
    steps: int  # inner steps of each of the 8 tasks

    @property
    def name(self) -> str:
        return f"{self.method}-K{self.K}-beta{self.beta:g}-seed{self.seed}-steps{self.steps}"


@dataclass(frozen=True)
class Study:
    """Where runs live, and what all of them share."""

    work: Path
    config: Path
    overrides: tuple[str, ...]
    workers: int

    def train(self, run: Run) -> bool:
        """Whether the run ended with a phi: one that diverges does not."""
        tasks = yaml.safe_load(self.config.read_text())["tasks"]
        algorithm, steps = run.method, run.steps
        if run.method == "single":  # the first task alone, for as many steps as all tasks together
            algorithm, steps, tasks = "mtl", run.steps * len(tasks), tasks[:1]
        if self._steps(self.phi(run)) == steps:
            return True
        overrides = [f"algorithm={algorithm}", f"meta_lr={run.beta}", f"seed={run.seed}", f"tasks={json.dumps(tasks)}"]
        overrides += [f"inner_steps={run.K}", f"episodes={steps // run.K}", f"run_dir={self.work / run.name}"]
        overrides += [f"snapshot_every={steps // 3}", "log_every=100", *STEEP.get(run.method, ()), *self.overrides]
        torch.set_num_threads(1)
        with (self.work / f"{run.name}.log").open("a") as log, redirect_stderr(log):
            try:
                code = train(load(TrainConfig, self.config, overrides))
            except RunError as error:
                print(error, file=log)
                dist.destroy_process_group()  # which a failed run leaves standing, not to wait for lost peers
                return False
        if code == STOPPED:
            raise KeyboardInterrupt
        return True

    def meta_test(self, config: Path, runs: Iterable[Run], overrides: Iterable[str]) -> dict[str, dict[str, dict]]:
        """The summary of meta_test.json for all the runs' phi and random initialization."""
        arguments = ["--config", config, *overrides, f"out={self.work / 'meta_test'}"]
        for run in runs:
            arguments += ["--phi", f"{run.name}={self.phi(run)}"]
        if subprocess.run(command("meta_test.py", *arguments, ranks=self.workers), cwd=ROOT, check=False).returncode:
            raise SystemExit("the meta-test failed; the same command goes on")
        return json.loads((self.work / "meta_test" / "meta_test.json").read_text())["summary"]

    def phi(self, run: Run) -> Path:
        return self.work / run.name / "phi.safetensors"

    def losses(self, run: Run) -> tuple[list[int], list[float]]:
        return task_average_loss(self.work / run.name)

    @staticmethod
    def _steps(phi: Path) -> int:
        if not phi.exists():
            return 0
        with safetensors.safe_open(phi, "pt") as file:
            return int(file.metadata()["step"])


def grid(index: int) -> float:
    """... 0.1, 0.2, 0.5, 1, 2, 5, ...: 1 is number 0."""
    return float(f"{(1, 2, 5)[index % 3]}e{index // 3}")


def start_beta(method: str, K: int) -> float:
    """The paper's value, on the grid; between its K, straight on logarithmic axes."""
    exponent = np.interp(math.log10(K), (1, 2, 3), np.log10(TABLE_3[method]))
    return min(map(grid, range(-12, 6)), key=lambda beta: abs(math.log10(beta) - exponent))


def tune(study: Study, run: Run) -> tuple[Run, dict[float, float | str]]:
    """Climbs the grid of beta from the paper's value until both neighbours have a higher loss in the last 100 steps."""
    found: dict[int, float] = {}
    best = next(index for index in range(-12, 6) if grid(index) == run.beta)
    while True:
        for index in (best, best - 1, best + 1):
            if index not in found:
                attempt = replace(run, beta=grid(index))
                loss = study.losses(attempt)[1][-1] if study.train(attempt) else math.inf
                found[index] = loss if math.isfinite(loss) else math.inf
        lowest = min(found, key=found.__getitem__)
        if lowest == best:
            tried = {grid(i): found[i] if math.isfinite(found[i]) else "diverged" for i in sorted(found)}
            print(f"{run.method}, K = {run.K}: beta {grid(best):g} of {tried}", flush=True)
            return replace(run, beta=grid(best)), tried
        best = lowest


def accuracy(summary: dict, runs: list[Run], target: str) -> tuple[float, float]:
    """Mean and half width of the 95 % interval in %: over meta-training seeds; of one, over the meta-test's."""
    rows = [summary[run.name][target] for run in runs]
    if len(rows) == 1:
        return rows[0]["accuracy"], rows[0]["ci95"]
    return interval([row["accuracy"] for row in rows])


def bars(ax: Axes, values: dict[str, tuple[float, float]]) -> None:
    """A horizontal bar a method with its interval, the highest first."""
    order = sorted(values, key=lambda method: values[method][0])
    for place, method in enumerate(order):
        mean, half = values[method]
        ax.barh(place, mean, 0.75, xerr=half, color=LOOKS[method][1], error_kw={"capsize": 2, "lw": 1})
    ax.set_yticks(range(len(order)), [LOOKS[method][0] for method in order])
    ax.set_xlabel("test accuracy (%)")


def draw(study: Study, out: Path, main: int, runs: dict, summary: dict, numbers: dict) -> None:
    """fig6.png and fig8.png with their numbers; `runs`: of every (method, K)."""
    targets = list(summary["random"])
    table = {
        target: {f"{method}, K={K}": accuracy(summary, group, target) for (method, K), group in runs.items()}
        | {"random": (summary["random"][target]["accuracy"], summary["random"][target]["ci95"])}
        for target in targets
    }
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    curves: dict[str, dict[str, list[float]]] = {}
    for (method, K), group in runs.items():
        if main != K or method in ("mtl", "single"):
            continue
        x = study.losses(group[0])[0]
        y = np.array([study.losses(run)[1] for run in group])
        a.plot(x, y.mean(0), label=LOOKS[method][0], color=LOOKS[method][1])
        a.fill_between(x, y.min(0), y.max(0), color=LOOKS[method][1], alpha=0.15, lw=0)
        curves[method] = {"cumulative_inner_steps": x, "loss": y.mean(0).tolist()}
    a.set_xlabel("cumulative inner steps, summed over the tasks")
    a.set_ylabel("task-average training loss")
    a.set_title(f"(a) meta-training, $K = {main}$")
    a.legend()
    every = {method: accuracy(summary, group, targets[0]) for (method, K), group in runs.items() if main == K}
    bars(b, every | {"random": table[targets[0]]["random"]})
    b.set_title(f"(b) meta-test on {targets[0]}")
    for method in SWEPT:
        points = sorted(
            (K, *accuracy(summary, group, targets[0])) for (name, K), group in runs.items() if name == method
        )
        K, mean, half = zip(*points, strict=True)
        c.errorbar(K, mean, half, label=LOOKS[method][0], color=LOOKS[method][1], marker="o", ms=4, capsize=2)
    c.set_xscale("log")
    c.set_xticks(K, [str(k) for k in K], minor=False)
    c.set_xticks([], minor=True)
    c.set_xlabel("$K$ of the meta-training")
    c.set_ylabel("test accuracy (%)")
    c.set_title("(c) the same against $K$")
    c.legend()
    save(fig, out, "fig6", numbers | {"curves": curves, "meta_test": table})

    short = min(K for _, K in runs)
    fig, axes = plt.subplots(1, len(targets) + 1, figsize=(4 * len(targets) + 4, 2.6), layout="constrained")
    for ax, target in zip(axes, targets, strict=False):
        bars(ax, {method: accuracy(summary, runs[method, main], target) for method in COMPARED})
        ax.set_title(f"{target}, $K = {main}$")
        low = min(accuracy(summary, runs[method, main], target)[0] for method in COMPARED)
        ax.set_xlim(left=low - 10 if low > 20 else 0)
    bars(axes[-1], {m: accuracy(summary, runs[m, short], targets[0]) for m, K in runs if short == K})
    axes[-1].set_title(f"{targets[0]}, $K = {short}$")
    save(
        fig, out, "fig8", {"meta_test": table, "runs": {name: row for name, row in summary.items() if name != "random"}}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "realdata_small.yaml")
    parser.add_argument("--meta-test", type=Path, default=ROOT / "configs" / "realdata_small_meta_test.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fig6_fig8", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the figures (default {RESULTS})")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, a process each")
    parser.add_argument("--K", type=int, nargs="+", default=[10, 30, 100], help="the last one is the main comparison's")
    parser.add_argument("--steps", type=int, default=900, help="inner steps of each task in a run")
    parser.add_argument("--tune-steps", type=int, default=300, help="the same where beta is tuned")
    parser.add_argument("--seeds", type=int, default=3, help=f"meta-training seeds of {', '.join(COMPARED)}")
    parser.add_argument("--test", nargs="*", default=["seeds=3", "steps=200", "batch_size=32", "eval_points=2"])
    parser.add_argument("overrides", nargs="*", default=["batch_size=16", "channels_last=true"], metavar="key=value")
    args = parser.parse_intermixed_args()
    args.work.mkdir(parents=True, exist_ok=True)
    study = Study(args.work, args.config, tuple(args.overrides), args.workers)
    main = args.K[-1]

    wanted = [(method, main) for method in TABLE_3] + [(m, K) for K in args.K[:-1] for m in SWEPT]
    wanted += [("no_shifting", args.K[0]), ("random_shifting", args.K[0])]
    starts = [Run(method, K, start_beta(method, K), 0, args.tune_steps) for method, K in wanted]
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"))
    tuned = list(pool.map(partial(tune, study), starts))
    betas = {(run.method, run.K): run.beta for run, _ in tuned}
    betas |= {("accurate", args.K[0]): betas["cts", args.K[0]], ("mtl", main): 1, ("single", main): 1}

    runs = {
        (method, K): [
            Run(method, K, beta, seed, args.steps)
            for seed in range(args.seeds if method in COMPARED and main == K else 1)
        ]
        for (method, K), beta in betas.items()
    }
    queue = sorted((run for group in runs.values() for run in group), key=lambda run: (run.seed, -run.K))
    for run, ended in zip(queue, pool.map(study.train, queue), strict=True):
        if not ended:
            raise SystemExit(f"{run.name} did not end: {study.work / run.name}.log says why; the same command goes on")
    summary = study.meta_test(args.meta_test, queue, args.test)
    numbers = {
        "steps": args.steps,
        "overrides": args.overrides,
        "meta_test_overrides": args.test,
        "tuning": {f"{run.method}, K={run.K}": {"steps": args.tune_steps, "losses": tried} for run, tried in tuned},
        "beta": {f"{method}, K={K}": beta for (method, K), beta in betas.items()},
    }
    draw(study, args.out, main, runs, summary, numbers)


if __name__ == "__main__":
    main()
