"""Flat vectors: views, alignment, memory formats, and what two ranks compare."""

import pytest
import torch
from torch import nn

from dist_cts import models
from dist_cts.flat import ALIGNMENT, FlatLayout, FlatParams, load_named
from dist_cts.models import ModelConfig


def test_the_model_computes_with_the_flat_memory():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    before = model(x)
    flat = FlatParams(model, "1")
    assert torch.equal(model(x), before)
    flat.differentiate(model[0](x).sum())
    gradients = flat.layout.views(flat.grad)
    assert torch.equal(gradients["0.weight"], x.sum(0).expand(5, 3))
    assert gradients["1.weight"].count_nonzero() == 0  # the loss does not use it
    flat.vector.zero_()
    assert torch.equal(model(x), torch.zeros(4, 2))
    flat.layout.views(flat.vector)["1.bias"].fill_(3.0)
    assert torch.equal(model[1].bias.detach(), torch.full((2,), 3.0))


def test_the_body_comes_first_and_every_tensor_is_aligned():
    model, head = models.build(ModelConfig(name="tiny"), 7, 0)
    flat = FlatParams(model, head)
    body, whole = flat.body_layout, flat.layout
    assert whole.slots[: len(body.slots)] == body.slots
    assert {slot.name for slot in whole.slots[len(body.slots) :]} == {"fc.weight", "fc.bias"}
    assert all(slot.offset * 4 % ALIGNMENT == 0 for slot in whole.slots)
    assert flat.body.data_ptr() == flat.vector.data_ptr()
    assert len(flat.body) == body.numel


def test_channels_last_weights_keep_their_format():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    weight = model.weight.detach().clone()
    flat = FlatParams(model, None)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight.detach(), weight)
    assert flat.layout.views(flat.grad)["weight"].is_contiguous(memory_format=torch.channels_last)


def test_load_named_copies_and_names_what_does_not_fit():
    layout = FlatLayout.of([("a", torch.zeros(2, 3)), ("b", torch.zeros(4))])
    vector = torch.zeros(layout.numel)
    load_named(layout, vector, {"a": torch.ones(2, 3), "b": torch.full((4,), 2.0), "other": torch.ones(1)})
    assert vector.sum() == 6 + 8
    with pytest.raises(ValueError, match=r"tensor 'b' .* is missing"):
        load_named(layout, vector, {"a": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"tensor 'a' is \[3, 2\], the model has \[2, 3\]"):
        load_named(layout, vector, {"a": torch.ones(3, 2), "b": torch.ones(4)})


def test_views_of_a_slice_lie_in_the_slice():
    layout = FlatLayout.of([("a", torch.zeros(3))])
    rows = torch.zeros(2, layout.numel)
    layout.views(rows[1])["a"].fill_(1.0)
    assert rows.sum(1).tolist() == [0.0, 3.0]


def test_fingerprints_differ_with_shape_stride_name_and_type():
    def fingerprint(name="a", tensor=None):
        return FlatLayout.of([(name, torch.zeros(2, 3, 4, 4) if tensor is None else tensor)]).fingerprint()

    others = [
        fingerprint("b"),
        fingerprint(tensor=torch.zeros(3, 2, 4, 4)),
        fingerprint(tensor=torch.zeros(2, 3, 4, 4, dtype=torch.float64)),
        fingerprint(tensor=torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    ]
    assert len({fingerprint(), *others}) == 5
    assert fingerprint() == fingerprint()


def test_mixed_types_and_missing_heads_are_errors():
    with pytest.raises(ValueError, match="one dtype"):
        FlatLayout.of([("a", torch.zeros(1)), ("b", torch.zeros(1, dtype=torch.float64))])
    with pytest.raises(ValueError, match="no parameter in its head 'fc'"):
        FlatParams(nn.Linear(2, 2), "fc")
    with pytest.raises(ValueError, match="no body"):
        FlatParams(nn.Sequential(nn.Linear(2, 2)), "0")
