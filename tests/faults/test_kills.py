"""SIGKILL before each change of a file by prepare and meta-test: the same command then gives the same files."""

import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.batches import write_task
from tests.helpers.commands import assert_equal, phi
from tests.helpers.small_run import LIMIT

full = pytest.mark.faults
pytestmark = pytest.mark.timeout(3 * LIMIT)
MOST = 100  # changes of files, far more than any of these commands makes


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def killed(start, tmp_path):
    """killed(n, below, script, ...): SIGKILL before its n-th change below `below`; whether it got there."""

    def killed(number, below, *command):
        once = tmp_path / f"once-{number}"
        fault = {"act": "kill", "rank": 0, "at": "change", "step": number, "below": str(below), "once": str(once)}
        code, _, err = start(*command, environment={"FAULT": json.dumps(fault)}).finish()
        assert code == (-9 if once.exists() else 0), err
        return once.exists()

    return killed


@pytest.fixture
def preparation(tmp_path):
    """The command that prepares four photos in two classes, without its output folder."""
    for name, seed in itertools.product(("ant", "bee"), range(2)):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([ord(name[0]), seed]).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{seed}.png")
    return ("prepare.py", "image-folder", "--root", tmp_path / "photos", "--name", "p", "--pixels", "6", "--out")


def check_preparation(start, killed, preparation, tmp_path, numbers):
    assert start(*preparation, tmp_path / "whole").finish()[0] == 0
    for number in numbers:
        out = tmp_path / f"out-{number}"
        reached = killed(number, out, *preparation, out)
        code, _, err = start(*preparation, out).finish()
        assert code == 0, err
        assert content(out) == content(tmp_path / "whole")
        shutil.rmtree(out)
        if not reached:
            return number
    return None


def test_a_killed_preparation_is_repeated(start, killed, preparation, tmp_path):
    assert check_preparation(start, killed, preparation, tmp_path, [4]) is None


@full
def test_a_preparation_killed_at_any_change_of_a_file_is_repeated(start, killed, preparation, tmp_path):
    assert check_preparation(start, killed, preparation, tmp_path, range(1, MOST)) > 8


@pytest.fixture
def adaptation(tmp_path, tasks):
    """The command of a meta-test of two jobs, without its output folder."""
    path = tmp_path / "test.yaml"
    path.write_text(
        f"targets: [a]\nseeds: 2\nsteps: 2\nbatch_size: 8\neval_points: 1\ndevice: cpu\nmodel: {{name: tiny}}\n"
        f"data: {{root: {tasks}}}\n"
    )
    return ("meta_test.py", "--config", path)


def check_adaptation(start, killed, adaptation, tmp_path, numbers):
    assert start(*adaptation, f"out={tmp_path / 'whole'}").finish()[0] == 0
    expected = json.loads((tmp_path / "whole" / "meta_test.json").read_text())
    for number in numbers:
        out = tmp_path / f"out-{number}"
        reached = killed(number, out, *adaptation, f"out={out}")
        code, _, err = start(*adaptation, f"out={out}").finish()
        assert code == 0, err
        assert json.loads((out / "meta_test.json").read_text())["results"] == expected["results"]
        assert {path.name for path in out.rglob("*")} == {path.name for path in (tmp_path / "whole").rglob("*")}
        shutil.rmtree(out)
        if not reached:
            return number
    return None


def test_a_killed_meta_test_resumes(start, killed, adaptation, tmp_path):
    assert check_adaptation(start, killed, adaptation, tmp_path, [6]) is None


@full
def test_a_meta_test_killed_at_any_change_of_a_file_resumes(start, killed, adaptation, tmp_path):
    assert check_adaptation(start, killed, adaptation, tmp_path, range(1, MOST)) > 8


@full
def test_a_run_killed_before_a_damaged_checkpoint_is_set_aside_resumes(start, killed, tmp_path, tasks):
    def command(run):
        keys = [
            "tasks=[a, b]",
            f"data.root={tasks}",
            "model={name: tiny}",
            "inner_steps=5",
            "batch_size=8",
            "device=cpu",
        ]
        keys += ["checkpoint={every_steps: 5, keep: 5}", f"run_dir={tmp_path / run}"]
        return ("train.py", "--config", tmp_path / "empty.yaml", *keys)

    (tmp_path / "empty.yaml").touch()
    for run in ("whole", "run"):
        assert start(*command(run), "episodes=3").finish()[0] == 0
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-00000015")
    (newest / "phi.safetensors").write_bytes(b"damaged")
    for number in (1, 2):
        killed(number, ".damaged", *command("run"), "episodes=4")
    for run in ("whole", "run"):
        code, _, err = start(*command(run), "episodes=4").finish()
        assert code == 0, err
    assert_equal(phi(tmp_path / "run"), phi(tmp_path / "whole"))


def test_a_task_replaced_by_another_of_its_name_is_noticed(start, tmp_path):
    """A run does not resume on it; a meta-test does not reuse the results of the old one."""
    root, keys = tmp_path / "tasks", ["model={name: tiny}", "batch_size=8", "device=cpu"]
    write_task(root, "a", seed=1)
    (tmp_path / "empty.yaml").touch()
    keys += [f"data.root={root}"]
    train = ("train.py", "--config", tmp_path / "empty.yaml", *keys, "tasks=[a]", "inner_steps=3")
    train += (f"run_dir={tmp_path / 'run'}",)
    test = ("meta_test.py", "--config", tmp_path / "empty.yaml", *keys, "targets=[a]", "seeds=1", "steps=2")
    test += ("eval_points=1", f"out={tmp_path / 'out'}")
    assert start(*train, "episodes=1").finish()[0] == 0
    assert start(*test).finish()[0] == 0
    shutil.rmtree(root / "a")
    write_task(root, "a", seed=2)
    code, _, err = start(*train, "episodes=2").finish()
    assert code == 2, err
    assert "error: task a: its training data changed since checkpoint " in err
    (path,) = (tmp_path / "out" / "jobs").glob("a--random--0--*.json")
    before = json.loads(path.read_text())
    assert start(*test).finish()[0] == 0
    after = json.loads(path.read_text())
    assert not set(before["data"]) & set(after["data"])
    assert before["curve"] != after["curve"]
