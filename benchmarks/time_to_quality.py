"""Time until phi reaches a given meta-test accuracy, CTS against Reptile; see --help."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.runs import ROOT, command, training_seconds
from dist_cts.data.prepare import catalog
from dist_cts.data.prepare.task import Options, prepare

EPILOG = """\
For each seed both methods meta-train the demo's eight embedded tasks, taking turns; then phi's snapshots, one at the
end of each episode, are meta-tested on the two held-out tasks. A level is reached at the first snapshot whose mean
accuracy over the meta-test seeds is at least that level. Seconds count meta-training up to that snapshot, without
start-up and meta-test. Inner steps are summed over the tasks.

  python benchmarks/time_to_quality.py --world-size 2 --levels 40 50
"""
METHODS = {
    "cts": ["algorithm=cts", "meta_lr=0.1"],
    "reptile": ["algorithm=reptile", "meta_lr=1"],
}  # beta of each method
TASKS = ("digits", "letters", "symbols", "shapes", "textures", "colours", "counting", "orientation")
TARGETS = ("georgian", "icons")
INNER_STEPS = 60  # K
QUICK = ["model.name=tiny", "batch_size=8"]


def launch(world_size: int, script: str, *arguments: object) -> None:
    """Runs a command of launch/ on `world_size` ranks; its output goes to stderr."""
    subprocess.run(
        command(script, *arguments, ranks=world_size if world_size > 1 else None), stdout=sys.stderr, check=True
    )


def curves(meta_test: Path, runs: dict[str, Path]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By target and method: accuracy in %, seconds and cumulative inner steps of each snapshot, in order."""
    document = json.loads(meta_test.read_text())
    found: dict[str, dict[str, list]] = {}
    for start, row in document["summary"].items():
        method = start.partition("@")[0]
        steps, seconds = document["starts"][start], training_seconds(runs[method])
        for target, cell in row.items():
            point = {
                "accuracy": cell["accuracy"],
                "seconds": seconds[int(steps["step"])],
                "inner_steps": int(steps["cumulative_inner_steps"]),
            }
            found.setdefault(target, {}).setdefault(method, []).append(point)
    return {
        target: {method: sorted(points, key=lambda point: point["seconds"]) for method, points in methods.items()}
        for target, methods in found.items()
    }


def first_reaching(level: float, points: list[dict[str, float]]) -> dict[str, float] | None:
    """The first snapshot of at least that accuracy in %."""
    return next((point for point in points if point["accuracy"] >= level), None)


def table_rows(seeds: list[dict], levels: list[float]) -> Iterator[dict[str, object]]:
    for target in seeds[0]:
        for level in levels:
            for method in METHODS:
                reached = [point for seed in seeds if (point := first_reaching(level, seed[target][method]))]
                row: dict[str, object] = {"target": target, "level, %": f"{level:g}", "method": method}
                for key in ("seconds", "inner_steps"):
                    values = [point[key] for point in reached]
                    row[key.replace("_", " ")] = report.shown(report.spread(values)) if values else "-"
                yield row | {"seeds that reach it": f"{len(reached)} of {len(seeds)}"}


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per method (default %(default)s)")
    parser.add_argument("--episodes", type=int, default=8, help=f"M, of {INNER_STEPS} inner steps (default 8)")
    parser.add_argument("--levels", type=float, nargs="+", default=[30, 40, 50], help="accuracies in %%")
    parser.add_argument("--work", type=Path, help="folder to keep runs in; existing runs resume")
    args = parser.parse_args(arguments)
    tasks, targets, K, more, adapting = TASKS, TARGETS, INNER_STEPS, [], []
    if args.quick:
        tasks, targets, K, args.world_size, args.seeds, args.episodes = TASKS[:2], TARGETS[:1], 3, 1, 1, 2
        more, adapting, args.levels = QUICK, ["steps=5", "seeds=1"], [0, 100]
    shared = [f"device={args.device}", *more]
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        for name in (*tasks, *targets):
            prepare(catalog.entry(catalog.EMBEDDED + name), None, work / "tasks" / name, Options())
        shared.append(f"data.root={work / 'tasks'}")
        seeds = []
        for seed in range(args.seeds):
            runs = {method: work / f"seed-{seed}" / method for method in METHODS}
            for method in list(METHODS)[:: -1 if seed % 2 else 1]:
                training = [f"run_dir={runs[method]}", f"seed={seed}", f"episodes={args.episodes}", f"inner_steps={K}"]
                training += [f"tasks=[{','.join(tasks)}]", f"snapshot_every={K}", f"log_every={K}", *METHODS[method]]
                launch(args.world_size, "train.py", "--config", ROOT / "configs/demo.yaml", *training, *shared)
            out = work / f"seed-{seed}" / "meta_test"
            phis = [part for method, run in runs.items() for part in ("--phi", f"{method}={run / 'snapshots'}")]
            testing = [f"out={out}", f"targets=[{','.join(targets)}]", "random=false", *adapting]
            config = ROOT / "configs/demo_meta_test.yaml"
            launch(args.world_size, "meta_test.py", "--config", config, *phis, *testing, *shared)
            seeds.append(curves(out / "meta_test.json", runs))
    rows = list(table_rows(seeds, args.levels))
    report.publish("time-to-quality", {"methods": METHODS, "seeds": seeds}, rows, args, args.device, args.world_size)


if __name__ == "__main__":
    main()
