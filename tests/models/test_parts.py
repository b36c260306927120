"""Patterns: which parameters phi covers, which stay with the task and which are frozen."""

import pytest

from dist_cts import models
from dist_cts.flat import FlatParams
from dist_cts.models import ModelConfig

BODY = {"conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"}
HEAD = {"fc.weight", "fc.bias"}
NORM = {name for name in BODY if "bn" in name}


def flat_of(**keys):
    model, parts = models.build(ModelConfig(name="tiny", **keys), 4, 0)
    return model, FlatParams(model, parts)


def names(layout):
    return {slot.name for slot in layout.slots}


@pytest.mark.parametrize(
    ("body", "covered"),
    [
        (None, BODY),
        (["norm"], NORM),
        ("norm", NORM),
        (["head"], HEAD),
        (["*"], BODY | HEAD),
        (["conv?.weight", "bn1*"], {"conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias"}),
        (["-norm"], BODY - NORM),
        (["*", "-*.bias", "bn2.bias"], (BODY | HEAD) - {"bn1.bias", "fc.bias"}),
    ],
)  # fmt: skip
def test_patterns_select_what_phi_covers_and_the_rest_is_frozen(body, covered):
    model, flat = flat_of(body=body)
    assert names(flat.body_layout) == covered
    assert names(flat.layout) == covered | HEAD
    assert {name for name, p in model.named_parameters() if p.requires_grad} == covered | HEAD
    assert flat.parts.rest == BODY - covered
    assert names(flat.start_layout) == BODY | covered
    assert flat.parts.classes == (4 if covered & HEAD else 1)


def test_the_rest_can_be_private_and_the_head_frozen():
    model, flat = flat_of(body=["norm"], rest="private", head="frozen")
    assert names(flat.body_layout) == NORM
    assert names(flat.layout) == BODY
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == HEAD
    slots = [slot.name for slot in flat.layout.slots]
    assert slots[:4] == [slot.name for slot in flat.body_layout.slots]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (["nrom"], r"model\.body: 'nrom' matches no parameter of the model; nearest: norm"),
        (["conv3.weight"], r"nearest: conv2\.weight, conv1\.weight"),
        (["lora"], "model.body: 'lora' matches no parameter"),
        (["-*"], "no parameter is left for phi"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(body, message):
    with pytest.raises(ValueError, match=message):
        flat_of(body=body)


def test_an_empty_list_is_an_error():
    with pytest.raises(ValueError, match="body"):
        ModelConfig(body=[])
