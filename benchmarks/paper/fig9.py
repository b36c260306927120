"""Figure 9: how much each initialization improves on the one it started from, against the number of training images.

One meta-test per number of images; the file of 1,000 images is Table 1 (its meta_test.md is the table):

for n in 250 500 1000; do
    python launch/meta_test.py --config configs/paper/imagenet_meta_test.yaml train_limit=$n \\
        --phi none=ResNet18_Weights.IMAGENET1K_V1 --phi mtl=PHI --phi reptile=PHI --phi cts=PHI \\
        out=runs/imagenet/meta_test-$n
done
python benchmarks/paper/fig9.py runs/imagenet/meta_test-*/meta_test.json --base none

Differences are paired by the meta-test's seed, which sets images, head and data order of every initialization.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.paper.figures import RESULTS, save
from benchmarks.paper.long_horizon_report import LOOKS
from dist_cts.run.report import interval

Curves = dict[str, dict[str, list[tuple[int, float, float]]]]


def improvements(documents: Iterable[Mapping], base: str) -> Curves:
    """For every target and initialization: (training images, mean improvement in points, half width of its interval).

    Raises:
        SystemExit: two files have the same train_limit, files have different settings, or `base` is missing.
    """
    found: Curves = defaultdict(lambda: defaultdict(list))
    settings: dict[int, dict] = {}
    for document in documents:
        limit, summary = document["config"]["train_limit"], document["summary"]
        if limit in settings:
            raise SystemExit(f"two meta-tests have train_limit={limit}; give one file per number of images")
        if base not in summary:
            raise SystemExit(f"--base {base}: the meta-test with train_limit={limit} has {', '.join(summary)}")
        settings[limit] = {key: document["config"][key] for key in ("targets", "seeds", "steps", "batch_size", "inner")}
        for start, row in summary.items():
            for target, cell in row.items() if start != base else ():
                pairs = zip(cell["seeds"], summary[base][target]["seeds"], strict=True)
                found[target][start].append((limit, *interval([ours - theirs for ours, theirs in pairs])))
    if len({json.dumps(values, sort_keys=True) for values in settings.values()}) > 1:
        raise SystemExit("the meta-tests differ in more than train_limit: targets, seeds, steps, batch_size or inner")
    return {target: {start: sorted(points) for start, points in rows.items()} for target, rows in found.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta_tests", type=Path, nargs="+", metavar="meta_test.json", help="one per train_limit")
    parser.add_argument("--base", default="none", help="the initialization to improve on (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for fig9.png and fig9.json")
    args = parser.parse_args(arguments)
    panels = improvements([json.loads(path.read_text()) for path in args.meta_tests], args.base)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (target, starts) in zip(axes.flat, panels.items(), strict=False):
        for start, points in starts.items():
            label, colour = LOOKS.get(start, (start, None))
            count, mean, half = np.array(points).T
            ax.errorbar(count, mean, np.nan_to_num(half), label=label, color=colour, marker="o", ms=3, capsize=2)
        ax.axhline(0, color="#999999", lw=0.8)
        ax.set(xscale="log", title=target, xlabel="training images", ylabel=f"points above {args.base!r}")
    axes[0, 0].legend()
    save(fig, args.out, "fig9", {"base": args.base, "improvements": panels})


if __name__ == "__main__":
    main()
