"""The examples of the package: sinusoids, and a character language model over installed text."""

import json
import subprocess
import sys

import pytest
import torch

from dist_cts import models
from dist_cts.examples import characters, corpora, sinusoids
from dist_cts.models import ModelConfig
from tests.helpers.commands import ROOT


def test_a_sinusoid_task_is_a_sinusoid_of_its_own():
    splits = {name: sinusoids.DATASETS[name]("test") for name in ("sinusoid-0", "sinusoid-1", "target-0")}
    for split in splits.values():
        x, y = split.tensors
        basis = torch.cat([torch.sin(x), torch.cos(x)], 1)  # A sin(x - phase) lies in their span
        solution = torch.linalg.lstsq(basis, y).solution
        assert torch.allclose(basis @ solution, y, atol=1e-4)
        assert 0.1 <= solution.norm() <= 5
    assert len({split.fingerprint for split in splits.values()}) == 3
    assert len(sinusoids.DATASETS["sinusoid-0"]("train")) == 100
    assert len(sinusoids.DATASETS["target-0"]("train")) == 10


def test_every_corpus_is_large_enough_and_keeps_its_test_text_apart():
    for name in corpora.CORPORA:
        train, test = corpora.encoded(name)
        assert 30_000 < len(train) + len(test) <= corpora.LIMIT
        assert 0.09 < len(test) / (len(train) + len(test)) < 0.11
        assert max(train.max(), test.max()) < len(corpora.CHARACTERS)
        assert (train == 0).mean() < 0.01  # characters outside ASCII


def test_a_corpus_is_the_same_in_every_process():
    code = "from dist_cts.examples import corpora; print(corpora.DATASETS['licences']('train').fingerprint)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == corpora.DATASETS["licences"]("train").fingerprint


def test_a_window_is_text_followed_by_the_next_character():
    for split in ("train", "test"):
        windows = corpora.DATASETS["python"](split)
        for index in (0, len(windows) - 1):
            inputs, targets = windows[index]
            assert (inputs.dtype, inputs.shape, targets.shape) == (torch.int64, (64,), (64,))
            assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(windows[0][0], torch.from_numpy(corpora.encoded("python")[1][:64].astype("int64")))


def test_the_language_model_does_not_look_ahead():
    model, _ = models.build(ModelConfig(name="characters"), len(corpora.CHARACTERS), 0)
    assert isinstance(model, characters.CharacterModel)
    text = torch.randint(len(corpora.CHARACTERS), (2, corpora.CONTEXT))
    changed = text.clone()
    changed[:, 40] = (changed[:, 40] + 1) % len(corpora.CHARACTERS)
    before, after = model(text), model(changed)
    assert before.shape == (2, len(corpora.CHARACTERS), corpora.CONTEXT)
    torch.testing.assert_close(before[..., :40], after[..., :40])
    assert (before[..., 40] - after[..., 40]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "metric", "tasks", "target"),
    [("sinusoids", "rmse", "sinusoid-0,sinusoid-1", "target-0"), ("characters", "accuracy", "yaml,fonts", "web")],
)
def test_an_example_runs_from_the_command_line(start, tmp_path, name, metric, tasks, target):
    common = ["--import", f"dist_cts.examples.{name}", "batch_size=2"]
    fewer = [f"tasks=[{tasks}]", "episodes=1", "inner_steps=2", "log_every=2", f"run_dir={tmp_path}"]
    code, _, err = start("train.py", "--config", name, *common, *fewer).finish()
    assert code == 0, err
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", metric} <= record.keys()
    fewer = [f"targets=[{target}]", "steps=2", "seeds=1", "eval_points=1"]
    phi = tmp_path / "phi.safetensors"
    code, _, err = start("meta_test.py", "--config", f"{name}_meta_test", *common, "--phi", phi, *fewer).finish()
    assert code == 0, err
    results = json.loads((tmp_path / "meta_test" / "meta_test.json").read_text())["results"]
    assert [metric in result["curve"][-1] for result in results] == [True, True]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cts_learns_an_initialization_for_sinusoids(start, tmp_path):
    option = ["--import", "dist_cts.examples.sinusoids"]
    code, _, err = start("train.py", "--config", "sinusoids", *option, f"run_dir={tmp_path / 'run'}").finish(500)
    assert code == 0, err
    phi, out = f"cts={tmp_path / 'run' / 'phi.safetensors'}", tmp_path / "out"
    command = ["meta_test.py", "--config", "sinusoids_meta_test", *option, "--phi", phi, f"out={out}"]
    code, _, err = start(*command).finish(500)
    assert code == 0, err
    results = json.loads((out / "meta_test.json").read_text())["results"]
    losses = {
        start: sum(result["curve"][-1]["loss"] for result in results if result["start"] == start)
        for start in ("random", "cts")
    }
    assert losses["cts"] < 0.7 * losses["random"]
