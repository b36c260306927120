"""configs/paper against the paper's own tables, and configs/realdata_small beside them."""

from pathlib import Path

import pytest

from dist_cts import config
from dist_cts.algorithms.table import MethodConfig
from dist_cts.data.prepare import catalog, suites
from dist_cts.models import MODELS
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig

CONFIGS = Path(__file__).parent.parent / "configs"
# Supplement, Tables 1, 2, 4 and 5: image size of every dataset in pixels.
TASKS = {
    "tiny-imagenet-0-100": 64, "tiny-imagenet-100-200": 64, "cifar100": 32, "stanford-dogs": 84, "aircraft": 84,
    "cub": 84, "fashion-mnist": 28, "svhn": 32,
}  # fmt: skip
TARGETS = {"stanford-cars": 84, "quickdraw": 28, "flowers": 84, "pets": 84, "stl10": 32}
IMAGENET_TARGETS = {
    "cifar100-128px": 128, "cifar10-128px": 128, "svhn-128px": 128, "stanford-dogs-224px": 224, "pets-224px": 224,
    "flowers-224px": 224, "food101-224px": 224, "cub-224px": 224, "dtd-224px": 224,
}  # fmt: skip
IMAGENET = {f"imagenet-{part}": 224 for part in range(1, 9)}
# Supplement, Table 3, for K = 10, 100 and 1000; and what it does not list, for K = 1000.
BETAS = {"fomaml": (0.5, 0.2, 0.1), "leap": (0.1, 0.1, 0.1), "reptile": (5, 2, 1), "cts": (1, 0.1, 0.01)}
SMALL = {name: row[1] for name, row in BETAS.items()} | {  # K = 100
    "fomaml++": 0.2, "imaml": 0.1, "no_shifting": 0.1, "random_shifting": 0.1, "mtl": 1,
}  # fmt: skip
UNLISTED = {"fomaml++": 0.1, "imaml": 0.1, "no_shifting": 0.01, "random_shifting": 0.01, "mtl": 1}


def train(name):
    return config.load(TrainConfig, CONFIGS / f"{name}.yaml")


def names(loaded):
    return [task.name for task in loaded.tasks]


def pixels(*suite):
    """What the suites' commands make, by the task's name."""
    made = {}
    for task in (task for name in suite for task in suites.suite(name)):
        name = task.name or "-".join([task.dataset, *map(str, task.split_classes or ())])
        made[name] = task.pixels or catalog.entry(task.dataset).pixels
    return made


@pytest.mark.parametrize(("method", "beta"), [*UNLISTED.items(), *((name, row[-1]) for name, row in BETAS.items())])
def test_a_method_of_section_4_2(method, beta):
    run = train(f"paper/{method}")
    assert (run.algorithm, run.meta_lr, names(run)) == (method, beta, list(TASKS))
    assert (run.episodes, run.inner_steps, run.batch_size) == (200, 1000, 128)
    assert (run.inner.optimizer, run.inner.lr, run.inner.momentum, run.inner.weight_decay) == ("sgd", 0.01, 0.9, 0.0005)
    assert (run.model.name, run.model.width, run.init, run.method) == ("resnet20", 1, None, MethodConfig())


@pytest.mark.parametrize(("method", "row"), BETAS.items())
def test_the_betas_for_shorter_trajectories_are_said_and_load(method, row):
    path = CONFIGS / "paper" / f"{method}.yaml"
    text = path.read_text()
    for beta, steps in zip(row[:2], (10, 100), strict=True):
        assert f"meta_lr={beta:g}" in text or beta == row[-1]
        loaded = config.load(
            TrainConfig, path, [f"inner_steps={steps}", f"episodes={200_000 // steps}", f"meta_lr={beta}"]
        )
        assert loaded.inner_steps * loaded.episodes == 200 * 1000


def test_single_is_plain_training_on_all_of_tinyimagenet():
    run = train("paper/single")
    assert (run.algorithm, names(run), run.episodes * run.inner_steps) == ("mtl", ["tiny-imagenet"], 50_000)
    assert catalog.entry("tiny-imagenet").pixels == 64


@pytest.mark.parametrize(("method", "beta"), [("cts", 0.001), ("reptile", 1), ("mtl", 1)])
def test_a_method_of_section_4_3(method, beta):
    run = train(f"paper/imagenet_{method}")
    assert (run.algorithm, run.meta_lr, names(run)) == (method, beta, list(IMAGENET))
    assert (run.episodes, run.inner_steps, run.batch_size) == (50, 1000, 256)
    assert (run.inner.optimizer, run.inner.lr, run.inner.momentum, run.inner.weight_decay) == ("sgd", 0.01, 0.9, 0)
    assert (run.model.name, run.init) == ("resnet18", "ResNet18_Weights.IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("name", "model", "targets", "limit", "batch_size", "lr", "decay", "normalise"),
    [
        ("meta_test", "resnet20", TARGETS, 0, 128, 0.1, 0.0005, "half"),
        ("imagenet_meta_test", "resnet18", IMAGENET_TARGETS, 1000, 256, 0.01, 0.0001, "dataset"),
    ],
)
def test_the_meta_tests(name, model, targets, limit, batch_size, lr, decay, normalise):
    test = config.load(MetaTestConfig, CONFIGS / "paper" / f"{name}.yaml")
    assert (test.target_names, test.train_limit, test.batch_size) == (list(targets), limit, batch_size)
    assert (test.steps, test.seeds, test.schedule, test.model.name) == (1000, 5, "multi-step", model)
    assert (test.inner.optimizer, test.inner.lr, test.inner.momentum, test.inner.weight_decay) == (
        "nesterov",
        lr,
        0.9,
        decay,
    )
    assert test.data.normalise == normalise
    assert test.model.name in MODELS


def test_the_suites_make_every_task_at_the_paper_s_size():
    assert pixels("paper-8") == TASKS
    assert pixels("paper-targets") == TARGETS
    assert pixels("imagenet-8") == IMAGENET
    assert pixels("imagenet-targets") == IMAGENET_TARGETS


def test_the_small_set_has_the_same_methods():
    def methods(folder):
        return {path.stem for path in (CONFIGS / folder).glob("*.yaml") if "imagenet" not in path.stem}

    assert methods("paper") - {"meta_test"} == methods("realdata_small") == {*BETAS, *UNLISTED, "single"}
    for name in methods("realdata_small"):
        run = train(f"realdata_small/{name}")
        assert run.algorithm == ("mtl" if name == "single" else name)
        assert (run.inner_steps, run.batch_size, run.model.name, run.model.width) == (100, 32, "resnet20", 0.5)
        assert run.meta_lr == SMALL[run.algorithm]
        assert len(run.tasks) == (1 if name == "single" else 8)


def test_the_stand_in_for_section_4_3_takes_the_same_path():
    """configs/imagenet_small sets only what differs in size; its initialization is the phi of its own pretraining."""
    pretrained = Path("runs/imagenet_small/pretrain/phi.safetensors")
    for method in ("cts", "reptile", "mtl"):
        run, original = train(f"imagenet_small/{method}"), train(f"paper/imagenet_{method}")
        sizes = ("tasks", "init", "episodes", "inner_steps", "meta_lr", "batch_size", "data")
        assert run.model_dump(exclude=sizes) == original.model_dump(exclude=sizes)
        assert (len(run.tasks), Path(run.init), run.data.normalise) == (8, pretrained, original.data.normalise)
    path = CONFIGS / "imagenet_small" / "pretrain.yaml"
    pretraining = train("imagenet_small/pretrain").with_run_dir(path)
    assert (pretraining.algorithm, pretraining.init, names(pretraining)) == ("mtl", None, ["tiny-imagenet-0-160"])
    assert pretraining.run_dir == pretrained.parent
    sizes = ("targets", "steps", "batch_size", "eval_points", "data")
    small, original = (
        config.load(MetaTestConfig, CONFIGS / name).model_dump(exclude=sizes)
        for name in ("imagenet_small/meta_test.yaml", "paper/imagenet_meta_test.yaml")
    )
    assert small == original
