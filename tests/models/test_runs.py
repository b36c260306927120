"""configs/partial/: runs that train a part of a model, their phi, their resume and their meta-test."""

import json

import pytest
import torch

from dist_cts import config as configs
from dist_cts import load_phi, models
from dist_cts.checkpoint.phi import export_phi, phi_metadata
from dist_cts.flat import FlatParams
from dist_cts.models import ModelConfig
from dist_cts.models.parts import ADAPTERS
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig, meta_test
from dist_cts.run.train import train
from tests.helpers.batches import write_task

PARTS = ("head_only", "backbone_only", "norm_only", "lora")
SMALL = ["episodes=2", "inner_steps=3", "batch_size=8", "log_every=3", "reduction=ordered", "device=cpu", "tasks=[a,b]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tasks of 24 pixels and three classes."""
    folder = tmp_path_factory.mktemp("partial")
    for seed, name in enumerate(("a", "b", "c")):
        write_task(folder, name, classes=3, pixels=24, seed=seed)
    return folder


def load(name, root, folder, *overrides):
    if name == "lora":
        pytest.importorskip("timm")
        overrides = ("model.args={img_size: 24, patch_size: 8, depth: 2, drop_path_rate: 0.5}", *overrides)
    else:
        overrides = ("model.name=resnet8", "model.width=0.5", *overrides)
    keys = [*SMALL, f"data.root={root}", f"run_dir={folder}", *overrides]
    return configs.load(TrainConfig, configs.CONFIGS / "partial" / f"{name}.yaml", keys)


def start_of(config):
    """What a new task starts from before the first step, by name; and what phi covers."""
    model, parts = models.build(config.model, 3, config.seed, "phi")
    first, _ = models.build(config.model, parts.classes, config.seed, "phi")
    covered = {slot.name for slot in FlatParams(model, parts).body_layout.slots}
    return {name: p.detach() for name, p in first.named_parameters() if name not in parts.head}, covered


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_trained_the_rest_stays_and_a_meta_test_starts_from_both(root, tmp_path, name):
    config = load(name, root, tmp_path / "run")
    assert train(config) == 0
    file = tmp_path / "run" / "phi.safetensors"
    phi, (start, covered) = load_phi(file), start_of(config)
    assert phi.keys() == start.keys()
    for key, value in phi.items():
        assert torch.equal(value, start[key]) == (key not in covered), key
    assert (len(covered) < len(phi)) == (name != "backbone_only")
    assert json.loads(phi_metadata(file)["args"] if name == "lora" else "{}") == config.model.args
    test = MetaTestConfig(
        targets=["c"],
        seeds=1,
        steps=2,
        eval_points=1,
        batch_size=8,
        model=config.model,
        data={"root": root},
        device="cpu",
    )
    assert meta_test(test, [str(file)]) == 0


@pytest.mark.parametrize("name", ["norm_only", "lora"])
def test_a_resumed_run_has_the_same_bits(root, tmp_path, name):
    assert train(load(name, root, tmp_path / "whole")) == 0
    assert train(load(name, root, tmp_path / "parts", "episodes=1")) == 0
    assert train(load(name, root, tmp_path / "parts")) == 0
    whole, parts = (load_phi(tmp_path / run / "phi.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_frozen_weights_come_from_init_and_a_resume_on_others_is_refused(root, tmp_path):
    start, covered = start_of(load("norm_only", root, tmp_path / "run", "seed=5"))
    for number in (1, 2):
        export_phi(tmp_path / f"{number}.safetensors", {key: value + number for key, value in start.items()}, {})
    init = tmp_path / "init.safetensors"
    init.write_bytes((tmp_path / "1.safetensors").read_bytes())
    config = load("norm_only", root, tmp_path / "run", f"init={init}")
    assert train(config) == 0
    phi = load_phi(tmp_path / "run" / "phi.safetensors")
    assert all(torch.equal(phi[key], start[key] + 1) for key in start.keys() - covered)
    init.write_bytes((tmp_path / "2.safetensors").read_bytes())
    with pytest.raises(ValueError, match="or with other frozen weights: restore `init`"):
        train(config.model_copy(update={"episodes": 3}))


def test_private_weights_start_alike_and_stay_with_their_task(root, tmp_path):
    config = load("norm_only", root, tmp_path / "run", "model.rest=private")
    assert train(config) == 0
    phi, (start, covered) = load_phi(tmp_path / "run" / "phi.safetensors"), start_of(config)
    assert all(torch.equal(phi[key], start[key]) == (key not in covered) for key in start)


def test_a_head_in_phi_needs_equal_numbers_of_classes(root, tmp_path):
    write_task(root, "five", classes=5, pixels=24)
    with pytest.raises(ValueError, match=r"phi covers fc\.weight, which is \[3, .* in task a but \[5, .* in task five"):
        train(load("head_only", root, tmp_path / "run", "tasks=[a, five]"))


def test_graphs_and_compilation_are_refused_for_a_model_that_draws_masks(root, tmp_path):
    with pytest.raises(ValueError, match=r"compile=true: timm:vit_tiny_patch16_224 draws dropout masks"):
        train(load("lora", root, tmp_path / "run", "compile=true"))


def test_adapters_are_not_lost_silently(root, tmp_path):
    pytest.importorskip("timm")
    config = load("lora", root, tmp_path / "run")
    _, covered = start_of(config)
    assert all(name.endswith(ADAPTERS) for name in covered)
    with pytest.raises(ValueError, match=r"phi holds adapters such as .*set model\.lora"):
        models.with_adapters({"w": torch.ones(1)}, dict.fromkeys(covered, torch.ones(1)), "phi")


def test_timm_s_pretrained_weights_are_fitted_to_the_arguments(monkeypatch):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    hub = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(hub, lambda *arguments, **options: dict(theirs))
    model = ModelConfig(name="timm:vit_tiny_patch16_224", args={"img_size": 32, "depth": 1})
    for weights in ("pretrained", "augreg_in21k_ft_in1k"):
        loaded = load_phi(weights, model)
        assert torch.equal(loaded["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])
        assert loaded["pos_embed"].shape == (1, 5, 192)
    with pytest.raises(ValueError, match="has no weights 'augreg'; nearest: augreg_in21k"):
        load_phi("augreg", model)

    def offline(*arguments, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, offline)
    with pytest.raises(OSError, match=r"init=pretrained: timm cannot load .* \(ConnectionError: no route to host\)"):
        load_phi("pretrained", model)


def test_torchvision_s_pretrained_weights_are_found_by_the_model_s_name(monkeypatch, tmp_path):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    theirs = torchvision.models.squeezenet1_1().state_dict()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(theirs, folder / url.rpartition("/")[2])
    for weights in ("pretrained", "IMAGENET1K_V1", "DEFAULT"):
        loaded = load_phi(weights, ModelConfig(name="torchvision:squeezenet1_1"))
        assert torch.equal(loaded["features.0.weight"], theirs["features.0.weight"])
    with pytest.raises(
        ValueError, match=r"init=BEST: torchvision:squeezenet1_1 has the weights pretrained, IMAGENET1K_V1"
    ):
        load_phi("BEST", ModelConfig(name="torchvision:squeezenet1_1"))
    with pytest.raises(ValueError, match=r"init=pretrained: not a file \(.*\), and resnet20 has no such weights"):
        load_phi("pretrained", ModelConfig())
