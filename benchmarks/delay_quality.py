"""What a delay of d steps costs in quality: training loss and meta-test accuracy by d and beta; see --help."""

import json
import os
import statistics
import time
from pathlib import Path

import torch
from scipy import stats

from benchmarks import report
from benchmarks.delay_variants import Variant, meta_train_variants
from benchmarks.paper.figures import square_grid
from benchmarks.paper.synthetic_grid import grid_quality, meta_train_grid
from dist_cts.checkpoint.phi import export_phi
from dist_cts.commands.demo import FILES, draw_missing
from dist_cts.config import CONFIGS, load
from dist_cts.learner import InnerConfig
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig, meta_test
from dist_cts.synthetic import ENVIRONMENTS

EPILOG = """\
synthetic       the tasks of section 4.1 from 21 x 21 initializations (K = 100, M = 3): the mean loss of the end points
demo            the tasks of configs/demo.yaml, drawn if missing
long_horizon    the tasks of configs/long_horizon.yaml (benchmarks/paper/long_horizon.md prepares them)
realdata_small  the tasks of configs/realdata_small (benchmarks/results/2026-11-23-realdata-small.md prepares them)
All delays and betas of a seed train side by side on the same batches: a small convolutional network (`tiny`).
A JSON file per set and seed; an interrupted call resumes. `crossing`: meta-updates in flight at the end of an episode
are applied in the next one, instead of before it.

  python benchmarks/delay_quality.py --work runs/delay \\
      --data long_horizon=data/long_horizon realdata_small=data/realdata_small
"""
DELAYS, BETAS, SEEDS = (0, 1, 2, 4, 8, 16), (0.03, 0.1), (0, 1, 2)
INNER = InnerConfig(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0)  # of section 4.1
SMALL = ("model.name=tiny", "model.width=1", "batch_size=16", "data.padding=2", "device=cpu")
GRID_BETAS, GRID_DELAYS = (0.01, 0.03, 0.1, 0.2, 0.3), (0, 1, 2, 4, 8, 16, 32, 64)  # synthetic
SETS = {  # configurations of meta-training and meta-test
    "demo": ("demo", "demo_meta_test"),
    "long_horizon": ("long_horizon", "long_horizon_meta_test"),
    "realdata_small": ("realdata_small/cts", "realdata_small_meta_test"),
}
TESTING = ("steps=300", "seeds=2", "inner.lr=0.05")
SIZES = {  # overrides of meta-training and meta-test: what there is time for
    "demo": (("episodes=8", "inner_steps=60", "inner.lr=0.05"), TESTING),
    "long_horizon": (("episodes=6", "inner_steps=100", "inner.lr=0.05"), TESTING),
    "realdata_small": (("episodes=6", "inner_steps=100", "inner.lr=0.05"), TESTING),
}
VARIANTS = [Variant(beta, delay) for beta in BETAS for delay in DELAYS]
VARIANTS += [Variant(0.1, delay, crossing=True) for delay in (2, 4, 8)]
HARMLESS = 1.25  # times the loss at d = 0; the loss of so few initializations varies by a tenth
FAILED = 1e3  # a loss above it counts as divergence


def synthetic(beta: float, delay: int, crossing: bool) -> dict[str, float]:
    """Mean loss of the end points from all initializations, and the share of them that diverges."""
    env = ENVIRONMENTS["released"]
    path = meta_train_grid(env, square_grid(21), "cts", INNER, beta=beta, M=3, K=100, delay=delay, crossing=crossing)
    ends = grid_quality(env, path[-1])
    kept = ends[ends < FAILED]
    return {"loss": kept.mean().item() if len(kept) else None, "diverged": 1 - len(kept) / len(ends)}


def synthetic_grid(delays: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """`synthetic` by delay, beta and crossing."""
    return {
        f"d{delay}-beta{beta:g}{'-crossing' * crossing}": synthetic(beta, delay, crossing)
        for beta in GRID_BETAS
        for delay in delays
        for crossing in ((False, True) if delay else (False,))
    }


def one_seed(name: str, seed: int, size: tuple, data: Path, work: Path) -> dict[str, dict]:
    """The mean training loss of the last episode and the accuracy on every target, of every variant."""
    (file, test_file), (training, testing) = SETS[name], size
    values = [*SMALL, *training, f"data.root={data}", f"seed={seed}", "run_dir=unused"]
    phis, losses = meta_train_variants(load(TrainConfig, CONFIGS / f"{file}.yaml", values), VARIANTS)
    out = work / f"{name}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    results, starts = {}, {}
    for variant, phi, loss in zip(VARIANTS, phis, losses.tolist(), strict=True):
        this = key(name, variant.beta, variant.delay, seed, variant.crossing)
        results[this] = {"loss": loss} if loss < FAILED else {"diverged": True}
        if all(tensor.isfinite().all() for tensor in phi.values()):
            starts[this] = str(out / f"{this}.safetensors")
            export_phi(Path(starts[this]), phi, {})
    values = [*SMALL, *testing, f"data.root={data}", f"out={out}", "eval_points=1", "random=false"]
    tested = load(MetaTestConfig, CONFIGS / f"{test_file}.yaml", values)
    meta_test(tested, starts)
    for path in (out / "jobs").glob("*.json"):
        job = json.loads(path.read_text())
        results[job["start"]].setdefault("accuracy", {})[job["target"]] = job["curve"][-1]["accuracy"]
    return results


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and half the width of its 95 % interval (Student t); 0 for a single run."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "half": half, "runs": len(values)}


def summary(results: dict[str, dict]) -> list[dict[str, object]]:
    """A row per task set, beta and delay: loss and accuracy over the seeds, and their paired differences from d = 0."""
    rows = []
    for name in SETS:
        for beta in BETAS:
            for crossing in (False, True):
                for delay in DELAYS:
                    runs = {s: results.get(key(name, beta, delay, s, crossing)) for s in SEEDS}
                    runs = {seed: run for seed, run in runs.items() if run}
                    if runs:
                        rows.append(_row(results, name, beta, delay, crossing, runs))
    return rows


def _row(results: dict, name: str, beta: float, delay: int, crossing: bool, runs: dict[int, dict]) -> dict[str, object]:
    row = {"tasks": name, "beta": beta, "d": delay, "crossing": crossing, "runs": len(runs)}
    good = {seed: run for seed, run in runs.items() if "loss" in run}
    row["diverged"] = len(runs) - len(good)
    base = {seed: results.get(key(name, beta, 0, seed)) for seed in good}
    base = {seed: run for seed, run in base.items() if run and "loss" in run}
    for part, value in {
        "loss": lambda r: r["loss"],
        "accuracy": lambda r: 100 * statistics.mean(r["accuracy"].values()),
    }.items():
        row[part] = interval([value(run) for run in good.values()]) if good else None
        paired = [value(good[seed]) - value(base[seed]) for seed in base]
        row[f"{part} - at d = 0"] = interval(paired) if paired and (delay or crossing) else None
    return row


def key(name: str, beta: float, delay: int, seed: int, crossing: bool = False) -> str:
    """The name of a run."""
    return f"{name}-d{delay}-beta{beta:g}-seed{seed}{'-crossing' * crossing}"


def largest_harmless(grid: dict[str, dict], beta: float) -> int:
    """The largest delay up to which the synthetic loss is at most HARMLESS times that of d = 0."""
    limit, harmless = HARMLESS * grid[f"d0-beta{beta:g}"]["loss"], 0
    for delay in GRID_DELAYS:
        loss = grid[f"d{delay}-beta{beta:g}"]["loss"]
        if loss is None or loss > limit:
            break
        harmless = delay
    return harmless


def plot(rows: list[dict], grid: dict[str, dict], path: Path) -> None:
    """Loss and accuracy against the delay, paired by seed, and the largest harmless delay against beta."""
    import matplotlib.pyplot as plt

    panels = 4 if rows else 2
    figure, axes = plt.subplots(1, panels, figsize=(3.5 * panels, 3.4), layout="constrained")
    for beta in GRID_BETAS:
        losses = [grid[f"d{delay}-beta{beta:g}"]["loss"] or float("nan") for delay in GRID_DELAYS]
        axes[0].plot(GRID_DELAYS, losses, marker="o", markersize=3, label=f"beta {beta:g}")
    for name in SETS if rows else ():
        for beta in BETAS:
            own = [row for row in rows if (row["tasks"], row["beta"], row["crossing"]) == (name, beta, False)]
            for axis, part in ((axes[1], "loss"), (axes[2], "accuracy")):
                points = [(row["d"], row[f"{part} - at d = 0"]) for row in own if row[f"{part} - at d = 0"]]
                if points:
                    delays, differences = zip(*points, strict=True)
                    # Side by side: the intervals would cover each other.
                    delays = [delay * 1.04 ** len(axis.containers) for delay in delays]
                    means, halves = zip(*((value["mean"], value["half"]) for value in differences), strict=True)
                    style = {"capsize": 2, "marker": "o", "markersize": 3, "label": f"{name}, beta {beta:g}"}
                    axis.errorbar(delays, means, halves, **style)
                    axis.axhline(0, color="k", linewidth=0.8, linestyle=":")
    titles = (
        "synthetic: mean loss after 100 steps",
        "training loss - that of d = 0",
        "accuracy - that of d = 0, points",
    )
    for axis, title in zip(axes[:-1], titles, strict=False):
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(GRID_DELAYS if axis is axes[0] else DELAYS, GRID_DELAYS if axis is axes[0] else DELAYS)
        axis.set(xlabel="delay d, steps", title=title)
    for axis in axes[:-2]:  # the accuracy's lines are those of the loss
        axis.legend(fontsize=7)
    for axis in axes[1:-1]:
        axis.set_xlim(0.8, 25)
    axes[0].set_yscale("log")
    harmless = [max(largest_harmless(grid, beta), 0.5) for beta in GRID_BETAS]  # 0.5: none
    axes[-1].loglog(GRID_BETAS, harmless, "o-", label=f"synthetic: loss <= {HARMLESS} x that of d = 0")
    axes[-1].loglog(GRID_BETAS, [1 / beta for beta in GRID_BETAS], "k--", label="beta d = 1")
    axes[-1].loglog(GRID_BETAS, [0.5 / beta for beta in GRID_BETAS], "k:", label="beta d = 0.5")
    axes[-1].set(xlabel="beta", ylabel="d", title="largest harmless delay")
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SET=FOLDER",
        help="prepared tasks; sets without are left out (demo: data/demo)",
    )
    parser.add_argument("--report", action="store_true", help="start no run; report those that have finished")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"demo": (("episodes=1", "inner_steps=10"), ("steps=2", "seeds=1"))} if args.quick else SIZES
    data = {"demo": "data/demo"} | dict(pair.split("=", 1) for pair in args.data)
    if unknown := data.keys() - SETS:
        parser.error(f"--data: no such set: {', '.join(unknown)}; sets: {', '.join(SETS)}")
    for file, model in zip(FILES, (TrainConfig, MetaTestConfig), strict=True):
        config = load(model, file)
        draw_missing(file, Path(data["demo"]), config.task_names if model is TrainConfig else config.target_names)
    args.work.mkdir(parents=True, exist_ok=True)
    surface = args.work / "synthetic.json"
    grid = json.loads(surface.read_text()) if surface.exists() else synthetic_grid((0,) if args.quick else GRID_DELAYS)
    surface.write_text(json.dumps(grid, indent=1))
    results: dict[str, dict] = {}
    for seed, name in [(seed, name) for seed in SEEDS for name in sizes if name in data]:
        path = args.work / f"{name}-{seed}.json"
        if not path.exists() and not args.report:
            record = one_seed(name, seed, sizes[name], Path(data[name]), args.work)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(record))
            os.replace(temporary, path)
        results |= json.loads(path.read_text()) if path.exists() else {}
        if args.quick:
            break
    rows = summary(results)
    shown = [
        {k: (f"{v['mean']:.3f} ± {v['half']:.3f}" if isinstance(v, dict) else v) for k, v in row.items()}
        for row in rows
    ]
    surface_rows = [
        {"synthetic: beta": beta} | {f"d = {d}": grid[f"d{d}-beta{beta:g}"]["loss"] or "-" for d in GRID_DELAYS}
        for beta in ([] if args.quick else GRID_BETAS)
    ]
    report.publish("delay-quality", {"synthetic": grid, "runs": results, "summary": rows}, shown or surface_rows, args)
    if not args.quick:
        plot(rows, grid, (args.out or report.RESULTS) / f"{time.strftime('%F')}-delay-quality.png")


if __name__ == "__main__":
    main()
