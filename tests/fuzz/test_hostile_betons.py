"""Fuzzed .beton files and manifests; see hostile.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_cts.data import beton
from dist_cts.data.source import ResidentSource
from tests.helpers.hostile import attempt, bounded, damaged, values


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task's train.beton and what it holds."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("task") / "noise/train"
    images, labels = rng.integers(0, 256, (6, 5, 5, 3), dtype=np.uint8), np.arange(6) % 3
    beton.write(path, images, labels, ["cat", "dog", "emu"], pixels=5, source="noise")
    return path.with_suffix(".beton"), images, labels


def resident(path, checksum):
    """The manifest, images and labels of a .beton that passes."""
    manifest = beton.verify(path, checksum=checksum)
    source = ResidentSource(path, manifest, torch.device("cpu"))
    return manifest, source.images.numpy(), source.labels


@bounded(max_examples=150)
@given(data=st.data())
def test_any_manifest_is_refused_unless_it_says_the_same(task, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "train.json"
    path.write_bytes(data.draw(damaged(task[0].with_suffix(".json").read_bytes())))
    manifest = attempt(lambda: beton.read_manifest(path), path)
    assert manifest in (None, beton.read_manifest(task[0]))


@bounded(max_examples=150)
@given(key=st.sampled_from(list(beton.Manifest.model_fields)), value=values | st.integers(10**9, 10**12))
def test_any_value_of_a_manifest(task, tmp_path_factory, key, value):
    path, images, labels = task
    copy = tmp_path_factory.getbasetemp() / "value.beton"
    shutil.copy(path, copy)
    manifest = json.loads(path.with_suffix(".json").read_text()) | {key: value}
    del manifest["seal"]
    try:
        copy.with_suffix(".json").write_text(json.dumps(manifest))
    except TypeError:  # dates, bytes and such keys cannot be written
        return
    found = attempt(lambda: resident(copy, checksum=True), copy, copy.with_suffix(".json"))
    if found is not None:
        np.testing.assert_array_equal(found[1], images)
        np.testing.assert_array_equal(found[2], labels)


@bounded(max_examples=100)
@given(data=st.data())
def test_any_beton(task, tmp_path_factory, data):
    path, images, _ = task
    whole, copy = path.read_bytes(), tmp_path_factory.getbasetemp() / "any.beton"
    head, tail = whole[: beton.RECORDS + 6 * beton.SAMPLE.itemsize], whole[-300:]  # between them lie the images
    changed = data.draw(damaged(head)) + whole[len(head) : -300] + data.draw(damaged(tail))
    copy.write_bytes(changed)
    manifest = json.loads(path.with_suffix(".json").read_text())
    del manifest["seal"]
    copy.with_suffix(".json").write_text(json.dumps(manifest))
    found = attempt(lambda: resident(copy, checksum=True), copy)
    assert found is None or changed == whole
    copy.with_suffix(".json").write_text(json.dumps(manifest | {"bytes": len(changed)}))
    found = attempt(lambda: resident(copy, checksum=False), copy)
    if found is not None:
        assert found[1].shape == images.shape
        assert 0 <= found[2].min() <= found[2].max() < 3
