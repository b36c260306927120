"""Models by name: sizes, heads, arguments, weights that follow from the seed, and errors with the nearest names."""

import sys

import pytest
import torch
from torch import nn

from dist_cts import models
from dist_cts.models import Architecture, ModelConfig
from dist_cts.models.fit import try_forward
from dist_cts.models.head import find_head
from dist_cts.models.table import find_architecture

VIT = {"img_size": 32, "patch_size": 8, "depth": 2}


def body_sizes(model, parts):
    return [p.numel() for name, p in model.named_parameters() if name not in parts.head | parts.rest]


def test_resnet20_has_the_paper_s_body():
    sizes = body_sizes(*models.build(ModelConfig(name="resnet20"), 10, 0))
    assert sum(sizes) == 269_072
    assert len(sizes) == 57


@pytest.mark.parametrize(
    ("name", "pixels", "args"),
    [
        ("resnet20", 28, {}),
        ("resnet20", 84, {"depth": 1}),
        ("tiny", 20, {}),
        ("resnet18", 64, {}),
        ("torchvision:mobilenet_v3_small", 32, {}),
        ("torchvision:mnasnet0_5", 32, {"dropout": 0.5}),
        ("timm:resnet10t", 32, {"drop_path_rate": 0.1}),
        ("timm:convnext_atto", 32, {"depths": (1, 1, 1, 1)}),
        ("timm:vit_tiny_patch16_224", 32, VIT),
    ],
)
def test_logits_of_any_model(name, pixels, args):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    config = ModelConfig(name=name, args=args)
    model, parts = models.build(config, 7, 0)
    images = torch.randn(2, 3, pixels, pixels)
    assert model(images).shape == (2, 7)
    own = dict(model.named_parameters())
    assert {len(own[name]) for name in parts.head} == {7}
    assert parts.rest == set()
    random = "mobilenet" in name or args.get("dropout", 0) > 0 or "drop_path_rate" in args
    assert models.check_model(config, model, images, 7, "a") == random


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet50", "fc"),
        ("convnext_tiny", "classifier.2"),
        ("vit_b_16", "heads.head"),
        ("swin_t", "head"),
        ("densenet121", "classifier"),
        ("squeezenet1_0", "classifier.1"),
        ("efficientnet_b0", "classifier.1"),
        ("maxvit_t", "classifier.5"),
    ],
)
def test_the_head_of_torchvision_s_models_is_found(name, head):
    with torch.device("meta"):
        model = find_architecture(f"torchvision:{name}").build(7)
    assert find_head(model, 7) == (head,)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("convnext_tiny", ["head.fc"]),
        ("vit_small_patch16_224", ["head"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("efficientnet_b0", ["classifier"]),
        ("mobilenetv4_conv_small", ["classifier"]),
    ],
)
def test_the_head_of_timm_s_models_is_found(name, head):
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = find_architecture(f"timm:{name}").build(7)
    assert sorted(find_head(model, 7)) == head


def test_a_model_without_a_head_is_refused_unless_patterns_say_what_phi_covers(monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", Architecture(lambda classes: nn.Sequential(nn.Linear(4, 3), nn.Tanh())))
    with pytest.raises(ValueError, match=r"model\.name=mine: its head .*: its last layer 0 .* does not have 5 outputs"):
        models.build(ModelConfig(name="mine"), 5, 0)
    _, parts = models.build(ModelConfig(name="mine", body=["*"]), 5, 0)
    assert (parts.head, parts.rest) == (set(), set())


def test_width_scales_the_channels():
    model, _ = models.build(ModelConfig(name="resnet20", width=0.5), 3, 0)
    assert model.fc.in_features == 32
    with pytest.raises(ValueError, match=r"set model\.width=1"):
        models.build(ModelConfig(name="resnet18", width=0.5), 3, 0)


def test_weights_follow_from_the_seed_and_leave_torch_s_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, _ = models.build(ModelConfig(name="tiny"), 3, 0, "head", "a")
    assert torch.equal(torch.rand(1), expected)
    same, _ = models.build(ModelConfig(name="tiny"), 3, 0, "head", "a")
    other, _ = models.build(ModelConfig(name="tiny"), 3, 0, "head", "b")
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "resnte20"}, r"model\.name='resnte20': choose one of resnet20, .*; nearest: resnet20, "),
        ({"name": "resnet50x"}, "nearest: torchvision:resnet50"),
        ({"name": "torchvision:resnet51"}, "torchvision has no such model; nearest: torchvision:resnet50"),
        ({"name": "timm:resnt18"}, "timm has no such model; nearest: timm:resnet18"),
        ({"name": "timm:hf-hub:x"}, "timm has no such model"),
        ({"name": "timm:resnet18.a1"}, "timm:resnet18 has no weights 'a1'; nearest: .*a1_in1k"),
        ({"name": "resnet20", "args": {"detph": 1}}, r"model\.args\.detph: resnet20 has no .*; nearest: depth"),
        ({"name": "timm:vit_tiny_patch16_224", "args": {"dephts": 1}}, "has no such argument; nearest: depth"),
        ({"name": "resnet18", "args": {"zero_init": 1}}, "nearest: zero_init_residual"),
        ({"name": "resnet20", "args": {"depth": "x"}}, r"resnet20 cannot be built with them \(TypeError: "),
        ({"name": "timm:resnet18", "args": {"checkpoint_path": "x"}}, r"model\.args\.checkpoint_path: set by"),
        ({"name": "torchvision:resnet18", "args": {"weights": "DEFAULT"}}, r"model\.args\.weights: set by the task"),
    ],
)
def test_an_unknown_name_or_argument_gets_the_nearest_known_ones(keys, message):
    if "timm" in keys["name"]:
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message) as caught:
        models.build(ModelConfig(**keys), 5, 0)
    assert "\n" not in str(caught.value)


def test_without_timm_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'dist_cts\[timm\]'"):
        models.build(ModelConfig(name="timm:resnet18"), 5, 0)


@pytest.mark.parametrize(
    ("name", "args", "shape", "message"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 1}, (3, 32, 32),
         r"images 3 x 32 x 32 .*; it takes 3 x 224 x 224: .* --pixels 224 or set model\.args\.img_size=32 \("),
        ("timm:resnet10t", {"in_chans": 1}, (3, 32, 32), r"it takes 1 x 32 x 32: .* or set model\.args\.in_chans=3 \("),
        ("torchvision:squeezenet1_1", {}, (3, 8, 8), "it takes 3 x 24 x 24: prepare the task with --pixels 24"),
        ("tiny", {}, (1, 8, 8), r"images 1 x 8 x 8 .*; it takes 3 x 8 x 8: give the model 1 channels \("),
        ("torchvision:googlenet", {"init_weights": False}, (3, 64, 64),
         r"returns GoogLeNetOutputs for 2 images, expected \[2, 5\]; set model\.args\.aux_logits=false"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_images_says_both_sizes(name, args, shape, message):
    if "timm" in name:
        pytest.importorskip("timm")
    config = ModelConfig(name=name, args=args)
    with pytest.raises(ValueError, match=message) as caught:
        models.check_model(config, models.build(config, 5, 0)[0], torch.zeros(2, *shape), 5, "a")
    assert "\n" not in str(caught.value)


def test_the_trial_changes_neither_statistics_nor_generators():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before, state = [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()
    outputs, draws = try_forward(model, torch.randn(2, 3))
    assert draws
    assert not outputs.requires_grad
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), before, strict=True))
    assert not torch.equal(torch.get_rng_state(), state)  # by torch.randn above alone
    state = torch.get_rng_state()
    try_forward(model, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_readme_s_network_is_the_demo_s():
    demo, _ = models.build(models.ModelConfig(name="resnet20", width=0.5), 10, 0)
    ours = models.SmallResNet(classes=10, width=0.5)
    assert [(name, value.shape) for name, value in ours.named_parameters()] == [
        (name, value.shape) for name, value in demo.named_parameters()
    ]
