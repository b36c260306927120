"""The embedded tasks are balanced, reproducible to the bit and learnable."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from scipy import ndimage

from dist_cts.data.prepare import drawing, embedded
from dist_cts.data.prepare.embedded import META_TEST, META_TRAIN, TASKS, Split, make

drawn = cache(make)
every_task = pytest.mark.parametrize("name", TASKS)


def digest(splits: tuple[Split, Split]) -> str:
    return sha256(b"".join(part.tobytes() for split in splits for part in (split.images, split.labels))).hexdigest()


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_eight_tasks_train_and_two_are_held_out():
    assert (len(META_TRAIN), len(META_TEST)) == (8, 2)
    assert set(TASKS) == {*META_TRAIN, *META_TEST}
    for name, maker in TASKS.items():
        assert name == name.lower()
        assert " px" in maker.__doc__
        assert "\n" not in maker.__doc__


def test_tasks_differ_in_classes_size_and_colour():
    trains = [drawn(name)[0] for name in META_TRAIN]
    assert len({len(train.class_names) for train in trains}) == 8
    assert len({train.images.shape[1] for train in trains}) >= 4
    assert {train.images.ndim for train in trains} == {3, 4}


@every_task
def test_counts_types_and_balance(name: str):
    train, test = drawn(name)
    classes = len(train.class_names)
    assert 4 <= classes == len(set(train.class_names)) <= 30
    assert test.class_names == train.class_names
    total = len(train.labels) + len(test.labels)
    assert total >= 1500
    assert len(test.labels) / total == pytest.approx(0.2, abs=0.01)
    for split in (train, test):
        assert split.images.dtype == np.uint8
        assert split.images.shape[1] == split.images.shape[2]
        assert split.images.shape[3:] in ((), (3,))
        assert split.labels.dtype == np.int64
        assert len(split.images) == len(split.labels)
        assert len(set(np.bincount(split.labels, minlength=classes))) == 1


@every_task
def test_no_image_twice_and_none_blank(name: str):
    train, test = drawn(name)
    images = np.concatenate([train.images, test.images])
    assert len(rows(images)) == len(images)
    assert images.reshape(len(images), -1).std(1).min() > 8


def test_same_bits_on_every_call_and_in_a_fresh_process():
    here = {name: digest(drawn(name)) for name in TASKS}
    # backwards: no task may depend on what was drawn before it
    code = "from test_embedded import *; print(json.dumps({name: digest(make(name)) for name in reversed(TASKS)}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here
    assert digest(make("letters")) == here["letters"]


def test_another_seed_draws_other_images():
    assert not rows(make("letters", 1)[0].images) & rows(drawn("letters")[0].images)
    assert not np.array_equal(make("digits", 1)[0].images, drawn("digits")[0].images)  # the same scans in another split


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown embedded task 'letter'; choose one of digits, letters"):
        make("letter")


def test_digits_are_the_scans_of_scikit_learn():
    from sklearn.datasets import load_digits

    scans = load_digits()
    train, _ = drawn("digits")
    small = train.images[:, 2:-2, 2:-2].reshape(-1, 20 * 20)[:50].astype(float)
    grown = np.stack([ndimage.zoom(scan, 2.5, order=1).ravel() for scan in scans.images])
    nearest = np.corrcoef(small, grown)[:50, 50:].argmax(1)
    assert (scans.target[nearest] == train.labels[:50]).all()


def test_every_glyph_is_in_every_font_that_draws_it():
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for characters, fonts in (
        (embedded.LETTERS, drawing.DEJAVU + drawing.STIX + drawing.COMPUTER_MODERN),
        (embedded.SYMBOLS, embedded.SYMBOL_FONTS),
        (embedded.GEORGIAN, drawing.DEJAVU),
        (embedded.ICONS, embedded.ICON_FONTS),
    ):
        for font in fonts:
            missing = set(map(ord, characters)) - FT2Font(folder / f"{font}.ttf").get_charmap().keys()
            assert not missing, font


def test_placed_stamps_are_large_and_whole():
    stamps = np.full((3, 1, drawing.BOX, drawing.BOX), 255, np.uint8)
    for mask in drawing.place(np.random.default_rng(0), stamps, 20, 32, turn=180):
        filled = np.argwhere(mask > 0.5)
        assert np.ptp(filled, 0).max() > 0.7 * 32
        # a whole parallelogram is symmetric about its centre; one that lost a corner is not
        assert np.abs(filled.mean(0) - (filled.min(0) + filled.max(0)) / 2).max() < 0.6


def test_counting_shows_as_many_spots_as_its_label_says(monkeypatch: pytest.MonkeyPatch):
    masks = []
    paint = drawing.paint
    monkeypatch.setattr(
        embedded, "paint", lambda rng, drawn, *a, **k: masks.append(drawn) or paint(rng, drawn, *a, **k)
    )
    make("counting")
    spots = np.array([ndimage.label(mask > 0.5)[1] for mask in masks[0]])
    assert np.array_equal(spots, np.arange(len(spots)) % 8 + 1)


def features(images: np.ndarray) -> torch.Tensor:
    """[N, features]: fixed random 5 x 5 filters, rectified and averaged over a 3 x 3 grid."""
    x = torch.from_numpy(images).float().div(255)
    x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None]
    filters = torch.randn(32, x.shape[1], 5, 5, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.conv2d(x - x.mean((2, 3), keepdim=True), filters - filters.mean((2, 3), keepdim=True))
    return torch.nn.functional.adaptive_avg_pool2d(torch.cat([x.relu(), (-x).relu()], 1), 3).flatten(1)


def brightness(images: np.ndarray) -> torch.Tensor:
    """[N, 1]"""
    return torch.from_numpy(images.reshape(len(images), -1).mean(1, keepdims=True)).float()


def probe(name: str, describe: Callable[[np.ndarray], torch.Tensor]) -> float:
    """Test accuracy of ridge regression to one-hot labels from `describe`."""
    train, test = drawn(name)
    x, y = (torch.nn.functional.pad(describe(split.images).double(), (0, 1), value=1) for split in (train, test))
    mean, deviation = x[:, :-1].mean(0), x[:, :-1].std(0)
    x[:, :-1], y[:, :-1] = (x[:, :-1] - mean) / deviation, (y[:, :-1] - mean) / deviation
    hot = torch.nn.functional.one_hot(torch.from_numpy(train.labels)).double()
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ hot)
    return ((y @ weights).argmax(1).numpy() == test.labels).mean()


@every_task
def test_labels_can_be_learned_but_not_from_brightness(name: str):
    chance = 1 / len(drawn(name)[0].class_names)
    assert probe(name, features) > 2 * chance
    assert probe(name, brightness) < 1.6 * chance
