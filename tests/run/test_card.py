"""Sharing phi: the model card, its code, and phi from the Hugging Face Hub."""

import json
import re
import shutil
import sys

import pytest
import torch
import yaml

from dist_cts import load_phi, meta_test, train
from dist_cts.checkpoint.phi import export_phi, named_starts, phi_metadata
from dist_cts.run.card import write_card
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig


@pytest.fixture
def trained(tasks, tmp_path):
    common = {"device": "cpu", "batch_size": 8, "model": {"name": "tiny"}, "data": {"root": tasks}}
    config = TrainConfig(
        tasks=["a", "b"], episodes=1, inner_steps=4, meta_lr=0.5, log_every=2, run_dir=tmp_path / "my-run", loggers=[],
        **common,
    )  # fmt: skip
    assert train(config) == 0
    return config.run_dir, MetaTestConfig(targets=["c"], seeds=2, steps=2, eval_points=1, **common)


def test_the_card_says_what_was_trained_on_what_with_which_result(trained):
    run, config = trained
    _, front, text = (run / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "dist_cts", "tags": ["meta-learning", "initialization", "cts"]}
    assert "# my-run\n" in text
    assert "`tiny`, meta-learned by `cts` from 2 task(s):\na, b." in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| b | {last['loss']:.4g} | {last['accuracy']:.4g} |" in text
    assert "Meta-test" not in text
    assert meta_test(config, [str(run / "phi.safetensors")]) == 0
    row = next(line for line in (run / "meta_test/meta_test.md").read_text().splitlines() if "my-run" in line)
    assert row in (run / "README.md").read_text()


@pytest.mark.parametrize("name", ["tiny", "resnet18", "torchvision:resnet18", "timm:resnet18"])
def test_the_code_of_the_card_loads_phi(trained, monkeypatch, name):
    run, _ = trained
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    if name != "tiny":
        import torchvision

        body = torchvision.models.resnet18(num_classes=1).state_dict()
        body = {key: value for key, value in body.items() if "fc" not in key and "running" not in key}
        export_phi(run / "phi.safetensors", {k: v for k, v in body.items() if v.is_floating_point()}, {})
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["name"] = name
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        write_card(run)
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run)
    found = {}
    exec(code, found)
    state, phi = found["model"].state_dict(), load_phi("phi.safetensors")
    assert len(phi) > 3
    assert all(torch.equal(state[key], value) for key, value in phi.items())
    assert found["model"](torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_phi_from_the_hub_by_its_id_without_a_network(trained, monkeypatch, tmp_path):
    """Reads the cache of huggingface_hub, as after a download."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    run, config = trained
    commit, folder = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub/models--someone--my-phi"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / f"snapshots/{commit}").mkdir(parents=True)
    shutil.copy(run / "phi.safetensors", folder / f"snapshots/{commit}")
    for module in (hub.constants, hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    expected = load_phi(run / "phi.safetensors")
    for source in ("hf:someone/my-phi", f"hf:someone/my-phi@{commit}"):
        found = load_phi(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert phi_metadata("hf:someone/my-phi")["algorithm"] == "cts"
    assert named_starts(["hf:someone/my-phi@main"]) == {"my-phi": "hf:someone/my-phi@main"}
    with pytest.raises(OSError, match=r"hf:someone/absent: phi.safetensors cannot be downloaded \("):
        load_phi("hf:someone/absent")
    config = config.model_copy(update={"out": tmp_path / "out", "random": False, "seeds": 1})
    assert meta_test(config, ["hf:someone/my-phi"]) == 0
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub is not installed; pip install 'dist_cts\[hub\]'"):
        load_phi("hf:someone/my-phi")
