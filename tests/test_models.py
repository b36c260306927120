"""Models: sizes, heads, and weights that follow from the seed."""

import pytest
import torch

from dist_cts import models
from dist_cts.models import ModelConfig


def body_size(model, head):
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(f"{head}."))


def test_resnet20_has_the_paper_s_body():
    model, head = models.build(ModelConfig(name="resnet20"), 10, 0)
    assert body_size(model, head) == 269_072
    assert len([name for name, _ in model.named_parameters() if not name.startswith(f"{head}.")]) == 57


@pytest.mark.parametrize(("name", "pixels"), [("resnet20", 28), ("resnet20", 84), ("tiny", 20), ("resnet18", 64)])
def test_logits_for_any_image_size(name, pixels):
    model, _ = models.build(ModelConfig(name=name), 7, 0)
    assert model(torch.randn(2, 3, pixels, pixels)).shape == (2, 7)


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
