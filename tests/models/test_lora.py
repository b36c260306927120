"""LoRA: W + alpha / rank * up @ down in linear layers, convolutions and attention; the weights themselves frozen."""

import copy

import pytest
import torch
from torch import nn

from dist_cts import models
from dist_cts.flat import FlatParams
from dist_cts.models import Architecture, ModelConfig
from dist_cts.models.parts import ADAPTERS


class Mixed(nn.Module):
    """A grouped convolution, attention and linear layers."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1, groups=3)
        self.norm = nn.GroupNorm(2, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp = nn.Linear(6, 6)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(torch.relu(self.mlp(x)).mean(1))


@pytest.fixture
def mixed(monkeypatch):
    monkeypatch.setitem(models.MODELS, "mixed", Architecture(Mixed))

    def build(**lora):
        return models.build(ModelConfig(name="mixed", lora=lora or None), 5, 0)

    return build


def randomize(model):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(ADAPTERS):
            p.data.normal_(generator=generator)


def test_the_start_is_the_model_itself_and_phi_covers_the_adapters_alone(mixed):
    x = torch.randn(2, 3, 8, 8)
    plain, adapted = mixed()[0], mixed(rank=2)
    assert torch.equal(plain(x), adapted[0](x))
    flat = FlatParams(*adapted)
    weights = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "mlp.weight"]
    assert {slot.name for slot in flat.body_layout.slots} == {f"{w}{end}" for w in weights for end in ADAPTERS}
    assert flat.parts.head == {"fc.weight", "fc.bias"}
    assert flat.parts.rest == {name for name, _ in plain.named_parameters()} - flat.parts.head
    assert {name for name, p in adapted[0].named_parameters() if not p.requires_grad} == flat.parts.rest
    assert adapted[0].conv.weight_lora_down.shape == (2, 9)  # [r, 3 / 3 channels x 3 x 3]
    assert adapted[0].conv.weight_lora_up.shape == (6, 2)


@pytest.mark.parametrize("training", [True, False])
def test_each_weight_is_read_with_its_update(mixed, training):
    model, _ = mixed(rank=2, alpha=6)
    randomize(model)
    expected, tensors = mixed()[0], dict(model.named_parameters())
    for name, p in expected.named_parameters():
        p.data.copy_(tensors[name])
        if f"{name}_lora_up" in tensors:
            p.data += 3 * (tensors[f"{name}_lora_up"] @ tensors[f"{name}_lora_down"]).view(p.shape)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.train(training)(x), expected.train(training)(x))
    assert not torch.equal(model(x), mixed()[0](x))


def test_every_adapter_gets_a_gradient_and_the_weights_none(mixed):
    model, parts = mixed(rank=2)
    randomize(model)
    flat = FlatParams(model, parts)
    flat.differentiate(model(torch.randn(4, 3, 8, 8)).square().sum())
    assert all(view.count_nonzero() for view in flat.layout.views(flat.grad).values())


def test_an_adapted_model_is_copied_and_converted_like_any_other(mixed):
    model, _ = mixed(rank=2)
    randomize(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert model.to(torch.float64)(x.double()).dtype == torch.float64
    plain = mixed()[0]
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all(name.endswith(ADAPTERS) for name in unexpected)


def test_patterns_choose_the_weights_and_a_wrong_one_is_an_error(mixed):
    model, _ = mixed(rank=50, patterns=["mlp*", "head"])
    adapters = {name: list(p.shape) for name, p in model.named_parameters() if name.endswith(ADAPTERS)}
    assert adapters == {  # the rank is at most the smaller side
        "mlp.weight_lora_down": [6, 6], "mlp.weight_lora_up": [6, 6],
        "fc.weight_lora_down": [5, 6], "fc.weight_lora_up": [5, 5],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.lora\.patterns: 'mpl\*' matches no .* nearest: mlp\.weight"):
        mixed(patterns=["mpl*"])
