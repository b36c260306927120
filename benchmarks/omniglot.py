"""5-way 1-shot and 5-shot on Omniglot: every method of the table, beside what Nichol et al. (2018) published.

Needs a folder of Omniglot's characters, each a folder of its 20 drawings. See results/2026-11-25-omniglot.md.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from benchmarks.report import parser, publish
from dist_cts import MetaTestConfig, TrainConfig, config, meta_test, train
from dist_cts.commands import prepare
from dist_cts.models.table import MODELS, Architecture
from dist_cts.run.report import interval

EPILOG = """\
Three quarters of the characters train, each in 4 rotations that count as classes of their own; 20 are for validation
and the others are new: the tasks of the figures come from them. Among the settings of a method the best is chosen on
1-shot tasks of the validation characters after a short meta-training. Intervals: 95 %, over the tasks.

  python benchmarks/omniglot.py --root OMNIGLOT --work FOLDER
"""


@dataclass(frozen=True)
class Method:
    """A row of the table: configs/omniglot.yaml with `overrides`, and the settings that are tried, by name."""

    algorithm: str
    settings: Mapping[str, Sequence[str]]
    overrides: Sequence[str] = ("outer.schedule=linear",)
    episodes: int = 2000


def betas(*values: float) -> dict[str, list[str]]:
    """Settings that differ in beta."""
    return {f"{beta:g}": [f"meta_lr={beta}"] for beta in values}


def sgd(beta: float) -> dict[str, list[str]]:
    """SGD with momentum 0.9 and one beta: settings that differ in the rate of the inner steps."""
    chosen = [f"meta_lr={beta}", "inner.optimizer=sgd", "inner.momentum=0.9"]
    return {f"{rate:g}": [*chosen, f"inner.lr={rate}"] for rate in (0.01, 0.1)}


KEPT = [f"reset.{what}=false" for what in ("head", "optimizer", "statistics")]
METHODS = {
    "reptile": Method("reptile", betas(1)),  # that of Nichol et al.
    "cts": Method("cts", betas(1, 0.3, 0.1)),
    "no_shifting": Method("no_shifting", betas(1, 0.3, 0.1)),
    "fomaml": Method("fomaml", betas(0.3, 0.1, 0.03)),
    # CTS adds up beta * (phi - theta_k) over k = 1 .. K: 3 times Reptile's meta-update for the same beta.
    "cts-beta-0.3": Method("cts", betas(0.3)),
    "reptile-sgd": Method("reptile", sgd(1)),
    "cts-sgd": Method("cts", sgd(0.3)),
    "no_shifting-sgd": Method("no_shifting", sgd(1)),
    "random_shifting": Method("random_shifting", betas(0.3)),
    "fomaml++": Method("fomaml++", betas(0.1)),  # that of FOMAML
    "leap": Method("leap", betas(0.1)),  # the paper's, as of imaml
    "mtl-sgd": Method("mtl", sgd(1), overrides=()),  # refuses Adam and schedules of beta
    "single": Method("mtl", betas(1), overrides=("few_shot.ways=0", "batch_size=50", *KEPT)),  # one 728-way task
    "accurate": Method("accurate", betas(0.3)),
    "imaml": Method("imaml", betas(0.1), episodes=200),
}
PUBLISHED = {  # Nichol et al. (2018), Omniglot, 5-way: accuracy and 95 % interval in percent, 1-shot and 5-shot
    "Reptile": ((95.39, 0.09), (98.90, 0.10)),
    "Reptile + transduction": ((97.68, 0.04), (99.48, 0.06)),
    "first-order MAML + transduction": ((98.3, 0.5), (99.2, 0.2)),
}
SHOTS = (1, 5)
TRAINING, VALIDATION = 0.75, 20  # share of the characters; number of them, at most two thirds of the others
PILOT, TASKS = 150, 600
WIDTH = 0.5  # 32 filters


class Conv4(nn.Module):
    """The network of Nichol et al. (2018): four strided convolutions of 64 channels with batch norm."""

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = max(1, round(64 * width))
        blocks = [
            nn.Sequential(nn.Conv2d(before, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())
            for before in (3, channels, channels, channels)
        ]
        self.body, self.fc = nn.Sequential(*blocks, nn.Flatten()), nn.Linear(4 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 28, 28] to logits [B, classes]."""
        return self.fc(self.body(x))


def prepare_tasks(root: Path, work: Path) -> dict[str, int]:
    """The tasks `training`, `validation` and `new` in WORK/tasks; returns their numbers of characters."""
    characters = sorted(path for path in root.iterdir() if path.is_dir())
    order = np.random.default_rng(0).permutation(len(characters))
    first = round(TRAINING * len(characters))
    second = first + min(VALIDATION, 2 * (len(characters) - first) // 3)
    parts = {"training": order[:first], "validation": order[first:second], "new": order[second:]}
    for name, chosen in parts.items():
        if not (work / "tasks" / name / "test.json").exists():
            raw = work / "raw" / name
            for character in (characters[index] for index in chosen):
                for angle in (0, 90, 180, 270) if name == "training" else (0,):
                    folder = raw / f"{character.name}-{angle}"
                    folder.mkdir(parents=True, exist_ok=True)
                    for file in character.glob("*.png"):
                        Image.open(file).convert("L").rotate(angle).save(folder / file.name)
            # 5 drawings of a new character are for training, 15 are queries.
            share = "0.05" if name == "training" else "0.75"
            options = ["--root", raw, "--out", work / "tasks", "--name", name, "--pixels", 28, "--test-fraction", share]
            assert prepare.main(["image-folder", *map(str, options)]) == 0
    return {name: len(chosen) for name, chosen in parts.items()}


def meta_train(work: Path, name: str, setting: str, episodes: int) -> str:
    """Meta-trains by configs/omniglot.yaml on the training characters; returns the path of phi."""
    method, run_dir = METHODS[name], work / "runs" / f"{name}-{setting}-{episodes}"
    chosen = [f"algorithm={method.algorithm}", f"episodes={episodes}", "tasks=[training]", f"run_dir={run_dir}"]
    chosen += ["loggers=[]", *shared(work), *method.overrides, *method.settings[setting]]
    assert train(config.load(TrainConfig, config.find("omniglot"), chosen)) == 0
    return str(run_dir / "phi.safetensors")


def accuracy(work: Path, target: str, phis: Mapping[str, str], shots: int, tasks: int, *overrides: str) -> dict:
    """Mean accuracy and 95 % interval over the few-shot tasks of a target, by initialization, and one per task."""
    out = work / "tests" / f"{target}-{shots}-{'-'.join(phis) or 'random'}"
    chosen = [f"targets=[{target}]", f"few_shot.shots={shots}", f"seeds={tasks}", f"random={not phis}", f"out={out}"]
    settings = config.load(MetaTestConfig, config.find("omniglot_meta_test"), [*chosen, *shared(work), *overrides])
    assert meta_test(settings, phis) == 0
    results = json.loads((out / "meta_test.json").read_text())["results"]
    values: dict[str, list[float]] = {}
    for result in results:
        values.setdefault(result["start"], []).append(100 * result["curve"][-1]["accuracy"])
    return {start: dict(zip(("mean", "ci95"), interval(row), strict=True)) for start, row in values.items()}


def shared(work: Path) -> list[str]:
    """Settings of meta-training and meta-test."""
    return [f"data.root={work / 'tasks'}", "model.name=conv4", f"model.width={WIDTH}", "device=cpu"]


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, EPILOG)
    options.add_argument("--root", type=Path, required=True, help="folder with one folder of drawings per character")
    options.add_argument("--work", type=Path, help="folder of the runs, from which an interrupted benchmark resumes")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = options.parse_args(arguments)
    MODELS["conv4"] = Architecture(Conv4)
    quick = args.quick
    pilot, tasks, steps = (2, 4, ["steps=2"]) if quick else (PILOT, TASKS, [])
    document: dict[str, Any] = {"setting": {}, "validation": {}, "accuracy": {}, "published": PUBLISHED}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        document["characters"] = prepare_tasks(args.root, work)
        for name in ["random", *args.methods]:
            phis = {}
            if name != "random":
                settings, found = list(METHODS[name].settings)[: 1 if quick else None], {}
                for setting in settings if len(settings) > 1 else ():
                    phi = {name: meta_train(work, name, setting, pilot)}
                    found[setting] = accuracy(work, "validation", phi, 1, tasks // 12, *steps)[name]
                best = max(settings, key=lambda setting: found.get(setting, {"mean": 0})["mean"])
                document["setting"][name], document["validation"][name] = best, found
                phis = {name: meta_train(work, name, best, 3 if quick else METHODS[name].episodes)}
            document["accuracy"][name] = {
                f"{shots}-shot": accuracy(work, "new", phis, shots, tasks, *steps)[name] for shots in SHOTS
            }
    rows = [
        {"initialization": method, **{name: f"{cell['mean']:.2f} ± {cell['ci95']:.2f}" for name, cell in row.items()}}
        for method, row in document["accuracy"].items()
    ]
    publish("omniglot", document | {"tasks": tasks, "width": WIDTH}, rows, args)


if __name__ == "__main__":
    main()
