"""Figure 7: meta-test accuracy along meta-training, from the snapshots of runs with `snapshot_every`.

python launch/meta_test.py --config CONFIG --phi cts=runs/cts/snapshots --phi reptile=runs/reptile/snapshots out=OUT
python benchmarks/paper/fig7.py OUT/meta_test.json
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from fig6_fig8 import LOOKS
from figures import RESULTS, save


def curves(document: dict) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """For every target and run: (inner steps of each task, mean accuracy in %, half width of its 95 % interval)."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for start, row in document["summary"].items():
        run, is_snapshot, _ = start.rpartition("@")
        for target, cell in row.items() if is_snapshot else ():
            step = int(document["starts"][start]["step"])
            found[target][run].append((step, cell["accuracy"], cell["ci95"]))
    return {target: {run: sorted(points) for run, points in runs.items()} for target, runs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta_test", type=Path, help="a meta_test.json whose starts are NAME@STEP")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default {RESULTS})")
    args = parser.parse_args()
    document = json.loads(args.meta_test.read_text())
    panels = curves(document)
    if not panels:
        raise SystemExit(f"{args.meta_test}: no start is a snapshot NAME@STEP")
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.6), squeeze=False, layout="constrained")
    for ax, (target, runs) in zip(axes[0], panels.items(), strict=True):
        for run, points in runs.items():
            label, colour = LOOKS.get(run, (run, None))
            step, accuracy, half = np.array(points, dtype=float).T
            ax.errorbar(step, accuracy, np.nan_to_num(half), label=label, color=colour, marker="o", ms=3, capsize=2)
        ax.set_xscale("log")
        ax.set_title(target)
        ax.set_xlabel("inner steps of each task in meta-training")
    axes[0][0].set_ylabel("meta-test accuracy (%)")
    axes[0][0].legend()
    save(fig, args.out, "fig7", {"starts": document["starts"], "curves": panels})


if __name__ == "__main__":
    main()
