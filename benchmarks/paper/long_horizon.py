"""Runs the long-horizon study whose protocol is long_horizon.md: K up to 1000, paired seeds, every beta tuned.

Each finished run is one JSON file under --results, all that a later call needs to resume; run folders under
--work let an interrupted run resume from its checkpoint. tables.py and long_horizon_figures.py show the results.

python benchmarks/paper/long_horizon.py data.root=data/long_horizon
On a GPU, at the paper's size:
python benchmarks/paper/long_horizon.py --config configs/paper/cts.yaml --meta-test configs/paper/meta_test.yaml \\
    --validation gtsrb --single tiny-imagenet-0-100 --steps 200000 --tune-steps 20000 --results runs/paper-size
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from benchmarks.paper.long_horizon_runs import ROOT, Run, Study, argument_parser, execute, random_initialization
from dist_cts.data import beton

RESULTS = ROOT / "benchmarks" / "results" / "paper" / "long_horizon"
COMPARED = ("cts", "reptile", "no_shifting", "random_shifting")
OTHERS = ("leap", "fomaml++", "fomaml", "imaml")
FINE_LRS = (0.01, 0.03, 0.1)  # of the meta-test, tuned with random initialization on the validation tasks
SNAPSHOT_SEEDS = 3
TUNE_SEED = 100  # and the next one; main runs use other seeds
EXTENSIONS = 3  # maximum number of decades that a scan may add
PILOT_SEED = 200
LAMBDAS = (0.02, 0.2, 2, 20, 200)  # of iMAML, scanned together with beta
Stage = tuple[str, list[tuple[str, int]], list[int]]  # tune or main, (method, K) of each run, and the seeds of main
Setting = tuple[float, tuple[str, ...]]  # beta and further options of a method
JOINT: Setting = (1.0, ())  # joint training's


def score(record: dict) -> float:
    """What tuning maximizes: accuracy in %, the mean over validation tasks and meta-test seeds."""
    values = [value for seeds in record.get("accuracy", {}).values() for value in seeds]
    return sum(values) / len(values) if values else -math.inf


def grid(method: str) -> list[float]:
    """Four decades of beta around the paper's range for that kind of method (supplement, Table 3)."""
    low = -3 if method in ("cts", "no_shifting", "random_shifting", "leap") else -2
    return [float(f"1e{exponent}") for exponent in range(low, low + 5)]


def options(method: str) -> list[tuple[str, ...]]:
    """What is scanned together with beta."""
    return [(f"method.imaml.lam={value:g}",) for value in LAMBDAS] if method == "imaml" else [()]


def tune(submit: Callable[[Run], Future], method: str, K: int) -> Setting:
    """A method's setting at K by the protocol: decades, extended while the best is an edge; then its neighbours."""

    def scores(settings: Sequence[Setting], seed: int) -> dict[Setting, float]:
        runs = [submit(Run(method, K, beta, seed, "tune", options=more)) for beta, more in settings]
        return {setting: score(run.result()) for setting, run in zip(settings, runs, strict=True)}

    found = scores([(beta, more) for more in options(method) for beta in grid(method)], TUNE_SEED)
    for _ in range(EXTENSIONS):
        beta, more = max(found, key=found.__getitem__)
        tried = [value for value, other in found if other == more]
        if beta not in (min(tried), max(tried)):
            break
        further = beta / 10 if beta == min(tried) else beta * 10
        found |= scores([(float(f"{further:.0e}"), more)], TUNE_SEED)
    beta, more = max(found, key=found.__getitem__)
    if method in ("fomaml", "imaml"):
        found |= scores([(beta, (*more, "method.gradient_batch=next"))], TUNE_SEED)
        beta, more = max(found, key=found.__getitem__)
    candidates = [(float(f"{beta * factor:.0e}"), more) for factor in (0.3, 1, 3)]
    found |= scores([setting for setting in candidates if setting not in found], TUNE_SEED)
    again = scores(candidates, TUNE_SEED + 1)
    chosen = max(candidates, key=lambda setting: found[setting] + again[setting])
    print(f"{method}, K = {K}: beta {chosen[0]:g} {' '.join(more)}".rstrip(), flush=True)
    return chosen


class Queue:
    """Runs the jobs in submission order, `workers` at a time, with progress and time left."""

    def __init__(self, study: Study, workers: int, planned: int) -> None:
        """`planned`: inner steps of the whole study."""
        self.study, self.workers, self.planned = study, workers, planned
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        self.started, self.done, self.computed = time.time(), 0, 0

    def submit(self, run: Run) -> Future:
        there = (self.study.results / f"{run.name}.json").exists()
        future = self.pool.submit(execute, self.study, run)
        future.add_done_callback(partial(self._report, run, there))
        return future

    def _report(self, run: Run, there: bool, future: Future) -> None:
        if future.cancelled() or future.exception():
            return
        cost = self.study.cost(run)
        self.done += cost
        if there:
            return
        self.computed += cost
        rate = self.computed / (time.time() - self.started)
        left = max(0, self.planned - self.done) / rate / 3600
        print(f"{run.name}: {self.done / self.planned:.1%} done, about {left:.1f} h left", flush=True)


def plan(horizons: Sequence[int], untuned: Sequence[str], seeds: int, main_seeds: int) -> list[Stage]:
    """The stages in order: first the contrasts at the first K, then the other K, further seeds, the other methods."""
    stages: list[Stage] = []
    for K in horizons:
        methods = [(method, K) for method in COMPARED]
        stages += [("tune", methods, []), ("main", methods, list(range(seeds)))]
        if horizons[0] == K:
            stages.append(("main", [(method, K) for method in untuned], list(range(seeds))))
    main = [(method, horizons[0]) for method in COMPARED]
    others = [(method, horizons[0]) for method in OTHERS]
    return [*stages, ("main", main, list(range(seeds, main_seeds))), ("tune", others, []), ("main", others, [0])]


def check_pilot(record: dict, classes: dict[str, int]) -> None:
    """The pilot's condition: four tasks end below half of ln C, and five below 70 % of it."""
    shares = sorted(losses[-1] / math.log(classes[task]) for task, losses in record["loss"].items())
    print("pilot, last loss as a share of ln C: " + ", ".join(f"{share:.2f}" for share in shares), flush=True)
    if shares[3] > 0.5 or shares[4] > 0.7:
        raise SystemExit(
            "the pilot's condition is not met: reduce the number of classes per task and record it in the protocol"
        )


def choose_fine_lr(study: Study) -> Study:
    """The study with the meta-test's learning rate: best for random initialization on the validation tasks."""
    targets = list(study.validation)
    records = {
        lr: random_initialization(study, f"fine-lr-{lr:g}", targets=targets, seeds=2, **{"inner.lr": lr})
        for lr in FINE_LRS
    }
    best = max(records, key=lambda lr: score(records[lr]))
    print(f"meta-test: learning rate {best:g}", flush=True)
    return replace(study, fine_lr=best)


def run_stages(study: Study, stages: list[Stage], queue: "Queue") -> None:
    """Runs the protocol in order; finished runs are read from their files."""
    pilot = queue.submit(pilot_run(study)).result()
    check_pilot(pilot, {name: _classes(study, name) for name in pilot["loss"]})
    settings: dict[tuple[str, int], Setting] = {}
    for kind, cells, seeds in stages:
        if kind == "tune":
            with ThreadPoolExecutor(len(cells)) as threads:
                found = list(threads.map(lambda cell: tune(queue.submit, *cell), cells))
            settings |= dict(zip(cells, found, strict=True))
            continue
        runs = [main_run(study, *cell, settings.get(cell, JOINT), seed) for seed in seeds for cell in cells]
        for future in [queue.submit(run) for run in runs]:
            future.result()


def pilot_run(study: Study) -> Run:
    return Run("reptile", study.horizons[0], 1.0, PILOT_SEED, "pilot")


def main_run(study: Study, method: str, K: int, setting: Setting, seed: int) -> Run:
    along = method in COMPARED and study.horizons[0] == K and seed < SNAPSHOT_SEEDS
    return Run(method, K, setting[0], seed, snapshots=along, options=setting[1])


def planned_steps(study: Study, stages: list[Stage]) -> int:
    """Inner steps of the whole study, with ten tuning runs for each beta, and five more for each further option."""
    total = study.cost(pilot_run(study))
    for kind, cells, seeds in stages:
        for method, K in cells:
            if kind == "tune":
                total += (5 + 5 * len(options(method))) * study.cost(Run(method, K, 1.0, TUNE_SEED, "tune"))
            total += sum(study.cost(main_run(study, method, K, JOINT, seed)) for seed in seeds)
    return total


def _classes(study: Study, task: str) -> int:
    root = study.testing(None).data.root
    return beton.verify(root / task / "train.beton", checksum=False).classes


def main() -> None:
    parser = argument_parser(__doc__, ROOT / "runs" / "long_horizon", RESULTS, steps=6000)
    parser.add_argument("--validation", nargs="+", default=["letters", "tiny-imagenet-20-40"], help="tasks, no targets")
    parser.add_argument("--single", nargs="*", default=["tiny-imagenet-0-20", "fashion-mnist"], help="single sources")
    parser.add_argument(
        "--K", type=int, nargs="+", default=[1000, 100, 10], help="values of K, in the order in which they run"
    )
    parser.add_argument("--tune-steps", type=int, default=2000, help="inner steps per task of a tuning run")
    parser.add_argument("--main-seeds", type=int, default=8, help=f"of {', '.join(COMPARED)} at the first K")
    args = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(
        args.config,
        args.meta_test,
        tuple(args.validation),
        args.work,
        args.results,
        args.steps,
        args.tune_steps,
        tuple(args.K),
        tuple(args.overrides),
    )
    study = choose_fine_lr(study)
    random_initialization(study, "random")
    stages = plan(args.K, ["mtl", *(f"single-{name}" for name in args.single)], args.seeds, args.main_seeds)
    run_stages(study, stages, Queue(study, args.workers, planned_steps(study, stages)))


if __name__ == "__main__":
    main()
