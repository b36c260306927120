"""Few-shot adaptations together against one at a time: `together` of a meta-test; see --help."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.omniglot import Conv4
from benchmarks.report import alternate, parser, publish, ratio, shown, spread
from dist_cts import MetaTestConfig, config
from dist_cts.data import beton
from dist_cts.models.table import MODELS, Architecture
from dist_cts.run.meta_test import run_jobs

EPILOG = """\
configs/omniglot_meta_test.yaml (5 ways, 50 steps, batches of 5) on a target of 40 random classes of 28 x 28 pixels,
from the first read of a file to the results. A round has 20 adaptations one at a time and 20 together, in one thread.
conv4 is the network of benchmarks/omniglot.py.

  python benchmarks/together.py
"""
CASES = {
    "conv4, 1-shot": ("model={name: conv4}",),
    "conv4 of half width, 1-shot": ("model={name: conv4, width: 0.5}",),
    "conv4 of half width, 5-shot": ("model={name: conv4, width: 0.5}", "few_shot.shots=5"),
    "resnet8, 1-shot": ("model={name: resnet8}",),
}
TOGETHER, TASKS, ROUNDS = 20, 20, 5


def write_task(folder: Path, classes: int = 40) -> None:
    """A prepared task: per class 5 images for training and 15 for testing."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 15)):
        images = generator.integers(0, 256, (classes * count, 28, 28, 3), dtype=np.uint8)
        names = [str(label) for label in range(classes)]
        beton.write(
            folder / "noise" / split, images, np.arange(len(images)) % classes, names, pixels=28, source="noise"
        )


def main(arguments: list[str] | None = None) -> None:
    args = parser(__doc__, EPILOG).parse_args(arguments)
    MODELS["conv4"] = Architecture(Conv4)
    cases, tasks, rounds = (dict(list(CASES.items())[1:2]), 2, 1) if args.quick else (CASES, TASKS, ROUNDS)
    torch.set_num_threads(1)
    results, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        for name, chosen in cases.items():
            keys = ["targets=[noise]", f"data.root={folder}", "device=cpu", f"seeds={tasks}", *chosen]
            alone, together = (
                config.load(MetaTestConfig, config.find("omniglot_meta_test"), [*keys, f"together={number}"])
                for number in (1, min(TOGETHER, tasks))
            )
            competitors = {"alone": partial(run_jobs, alone, {}), "together": partial(run_jobs, together, {})}
            seconds = alternate(competitors, rounds)
            results[name] = {how: [value / tasks for value in values] for how, values in seconds.items()}
            rows.append(
                {
                    "adaptation": name,
                    **{f"{how}, ms": shown(spread([1e3 * v for v in row])) for how, row in results[name].items()},
                    "alone / together": shown(ratio(seconds["alone"], seconds["together"])),
                }
            )
            print(rows[-1], flush=True)
    publish("together", {"together": TOGETHER, "seconds_per_task": results}, rows, args)


if __name__ == "__main__":
    main()
