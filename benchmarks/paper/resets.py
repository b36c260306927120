"""Supplement C.2: does it matter what an episode resets besides theta? CTS at K = 100 with each choice, paired by seed.

    python benchmarks/paper/resets.py data.root=data/long_horizon

Meta-training and meta-test are those of the long-horizon study, but shorter: --steps per task, then 500 steps on its
four targets. A finished run is one JSON file in --results. `reset.statistics` is not among the choices: running
statistics are used in evaluation alone, so phi has the same bits with and without it (a test says so).
"""

import json
import os
from concurrent.futures import Future
from pathlib import Path

from benchmarks.paper.figures import RESULTS
from benchmarks.paper.long_horizon import Queue, score
from benchmarks.paper.long_horizon_runs import ROOT, Run, Study, argument_parser

FOLDER = RESULTS / "resets"
TARGETS = ("kmnist", "sign-language-digits", "georgian", "icons")
RESETS = {
    "nothing": (),
    "head": ("reset.head=true",),
    "optimizer": ("reset.optimizer=true",),
    "both": ("reset.head=true", "reset.optimizer=true"),
}
K, BETA = 100, 0.1  # the paper's beta for this K


def runs(seeds: int) -> list[Run]:
    """Every choice of the first seed, then of the next one."""
    return [Run("cts", K, BETA, seed, "tune", options=more) for seed in range(seeds) for more in RESETS.values()]


def accuracies(folder: Path) -> dict[str, dict[int, float]]:
    """By choice and seed of the finished runs: accuracy in %, mean over the targets."""
    found: dict[str, dict[int, float]] = {}
    for choice, more in RESETS.items():
        for path in sorted(folder.glob("*.json")):
            record = json.loads(path.read_text())
            if record["run"]["options"] == list(more):
                found.setdefault(choice, {})[record["run"]["seed"]] = score(record)
    return found


def main() -> None:
    parser = argument_parser(__doc__, ROOT / "runs" / "resets", FOLDER, steps=500)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    args = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(
        args.config,
        args.meta_test,
        tuple(args.targets),
        args.work,
        args.results,
        args.steps,
        args.steps,
        (K,),
        tuple(args.overrides),
    )
    wanted = runs(args.seeds)
    queue = Queue(study, args.workers, sum(map(study.cost, wanted)))
    submitted: list[Future] = [queue.submit(run) for run in wanted]
    for future in submitted:
        future.result()


if __name__ == "__main__":
    main()
