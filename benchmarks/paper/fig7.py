"""Figure 7: meta-test accuracy of several runs, as curves over meta-training or as one bar per run.

python launch/meta_test.py --config CONFIG --phi cts=runs/cts/snapshots --phi reptile=runs/reptile/snapshots out=OUT
python benchmarks/paper/fig7.py OUT/meta_test.json

The snapshots of runs with `snapshot_every` give curves, one panel per target; a phi.safetensors per run gives bars.
--runs adds a panel with the training loss of those run folders against cumulative inner steps.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.paper.figures import RESULTS, save
from benchmarks.paper.long_horizon_report import LOOKS
from dist_cts.run.curves import task_means
from dist_cts.run.report import draw_bars


def curves(document: dict) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """For every target and run: (inner steps of each task, mean accuracy in %, half width of its 95 % interval)."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for start, row in document["summary"].items():
        run, is_snapshot, _ = start.rpartition("@")
        for target, cell in row.items() if is_snapshot else ():
            step = int(document["starts"][start]["step"])
            found[target][run].append((step, cell["accuracy"], cell["ci95"]))
    return {target: {run: sorted(points) for run, points in runs.items()} for target, runs in found.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta_test", type=Path, help="meta_test.json")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run folders whose training loss to plot")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for fig7.png and fig7.json (default %(default)s)"
    )
    args = parser.parse_args(arguments)
    document = json.loads(args.meta_test.read_text())
    panels = curves(document)
    losses = {run.name: task_means(run, "loss") for run in args.runs}
    count = bool(losses) + (len(panels) or 1)
    fig, axes = plt.subplots(1, count, figsize=(3.2 * count, 2.6), squeeze=False, layout="constrained")
    axes = list(axes[0])
    if losses:
        ax = axes.pop(0)
        for run, (steps, loss) in losses.items():
            label, colour = LOOKS.get(run, (run, None))
            ax.plot(steps, loss, label=label, color=colour)
        ax.set_xlabel("cumulative inner steps, summed over the tasks")
        ax.set_ylabel("task-average training loss")
        ax.legend()
    for ax, (target, runs) in zip(axes, panels.items(), strict=False):
        for run, points in runs.items():
            label, colour = LOOKS.get(run, (run, None))
            step, accuracy, half = np.array(points, dtype=float).T
            ax.errorbar(step, accuracy, np.nan_to_num(half), label=label, color=colour, marker="o", ms=3, capsize=2)
        ax.set_xscale("log")
        ax.set_title(target)
        ax.set_xlabel("inner steps of each task in meta-training")
        ax.set_ylabel("meta-test accuracy (%)")
        ax.legend()
    if not panels:
        draw_bars(axes[0], document["summary"])
    save(fig, args.out, "fig7", {"starts": document["starts"], "losses": losses, "curves": panels})


if __name__ == "__main__":
    main()
