"""Draws meta-training loss against cumulative inner steps for several runs, beside their meta-test.

python benchmarks/compare_runs.py runs/a runs/b --meta-test runs/m/meta_test.json --out figure.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from dist_cts.run.metrics import task_average_loss
from dist_cts.run.report import draw_bars, start_colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, named as the starts of the meta-test")
    parser.add_argument("--meta-test", type=Path, required=True, help="meta_test.json")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    args = parser.parse_args()
    summary = json.loads(args.meta_test.read_text())["summary"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = start_colours(summary)
    for run in args.runs:
        left.plot(*task_average_loss(run), label=run.name, color=colours.get(run.name))
    left.locator_params(axis="x", nbins=5)
    left.set_xlabel("cumulative inner steps, all tasks")
    left.set_ylabel("task-average training loss")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    draw_bars(right, summary)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
