"""Fuzzed raw data; see hostile.py."""

import gzip
import os
import re
import shutil
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_cts.data.prepare import readers
from tests.helpers.hostile import attempt, bounded, content, damaged, idx_bytes, png, same

pytestmark = pytest.mark.usefixtures("elsewhere")
ABC = partial(readers.idx, class_names="abc")
WNIDS = ("n01443537", "n02058221", "n03970156")  # no two of them are a flipped bit apart


@bounded(max_examples=200)
@given(data=st.data(), which=st.sampled_from(["images", "labels"]), suffix=st.sampled_from(["", ".gz"]))
def test_any_idx_pair(tmp_path_factory, data, which, suffix):
    folder = tmp_path_factory.getbasetemp() / f"idx{suffix}"
    folder.mkdir(exist_ok=True)
    arrays = {"images": np.arange(32).reshape(2, 4, 4), "labels": np.array([2, 0])}
    files = {}
    for name, array in arrays.items():
        whole = idx_bytes(array)
        whole = gzip.compress(whole, mtime=0) if suffix else whole
        path = folder / f"train-{name}-idx{array.ndim}-ubyte{suffix}"
        files[name] = data.draw(damaged(whole)) if name == which else whole
        path.write_bytes(files[name])
    splits = attempt(lambda: ABC(folder), path.name, path.name.replace("labels-idx1", "images-idx3"))
    if splits is None:
        return
    images, labels = arrays["images"], arrays["labels"]
    if not suffix:  # what the file says, which may be another picture
        images = np.frombuffer(files["images"], np.uint8, offset=16)
        labels = np.frombuffer(files["labels"], np.uint8, offset=8)
    found = content(splits)
    assert [name for name, _ in found] == ["abc"[label] for label in labels]
    assert b"".join(pixels.tobytes() for _, pixels in found) == images.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """TinyImageNet's layout with PNGs, as a folder and as an archive, and what it holds."""
    home = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    train, val, lines = [], [], []
    for label, wnid in enumerate(WNIDS):
        for i in range(2):
            path = home / f"train/{wnid}/images/{wnid}_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data, pixels = png(10 * label + i)
            path.write_bytes(data)
            train.append((wnid, pixels))
    (home / "val/images").mkdir(parents=True)
    for i, label in enumerate([2, 0, 1]):
        data, pixels = png(100 + i)
        (home / f"val/images/val_{i}.png").write_bytes(data)
        val.append((WNIDS[label], pixels))
        lines.append(f"val_{i}.png\t{WNIDS[label]}\t0\t32\t44\t62\n")
    (home / "val/val_annotations.txt").write_text("".join(lines))
    (home / "wnids.txt").write_text("\n".join(WNIDS[::-1]) + "\n")
    with zipfile.ZipFile(home.parent / "whole.zip", "w") as archive:
        for path in sorted(home.rglob("*.*")):
            archive.write(path, path.relative_to(home.parent))
    with tarfile.open(home.parent / "whole.tar", "w") as archive:
        archive.add(home, home.name)
    with tarfile.open(home.parent / "whole.tar.gz", "w:gz") as archive:
        archive.add(home, home.name)
    return home, train + val


@bounded(max_examples=200)
@given(data=st.data(), name=st.sampled_from(["wnids.txt", "val/val_annotations.txt"]))
def test_any_list_of_tiny_imagenet(tiny, data, name):
    home, expected = tiny
    whole = (home / name).read_bytes()
    try:
        (home / name).write_bytes(data.draw(damaged(whole)))
        found = content(attempt(lambda: readers.tiny_imagenet(home), home))
        assert not found or same(found, expected)
    finally:
        (home / name).write_bytes(whole)


@bounded(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["zip", "tar", "tar.gz"]))
def test_any_archive(tiny, tmp_path_factory, data, kind):
    """No image gets another label; that one is missing in a damaged directory, its count must tell."""
    home, expected = tiny
    folder = tmp_path_factory.getbasetemp() / "archive"
    folder.mkdir(exist_ok=True)
    whole = (home.parent / f"whole.{kind}").read_bytes()
    if kind == "zip" and data.draw(st.booleans()):  # its directory at the end
        cut = whole.index(b"PK\1\2")
        changed = whole[:cut] + data.draw(damaged(whole[cut:]))
    else:
        changed = data.draw(damaged(whole))
    (folder / "tiny-imagenet-200.zip").write_bytes(changed)
    label_of = {pixels.tobytes(): name for name, pixels in expected}
    for name, pixels in content(attempt(lambda: readers.tiny_imagenet(folder), folder)):
        assert pixels is None or label_of[pixels.tobytes()] == name


@bounded(max_examples=100)
@given(data=st.data())
def test_any_image_of_a_folder(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "photos"
    expected = []
    for label, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            file, pixels = png(10 * label + i)
            (folder / name / f"{i}.png").write_bytes(file)
            expected.append((name, pixels))
    file, _ = png(0)
    (folder / "ant/0.png").write_bytes(data.draw(damaged(file)))
    found = content(readers.image_folder(folder))
    assert found[0][0] == "ant"
    assert found[0][1] is None or found[0][1].ndim >= 2
    assert same(found[1:], expected[1:])


letters = st.characters(exclude_characters="/\0", codec="utf-8") | st.sampled_from("\udcff\n\t")
names = st.text(letters, min_size=1, max_size=8)


@bounded(max_examples=100)
@given(classes=st.lists(names.filter(lambda name: name[0] not in "._"), min_size=1, max_size=4, unique=True))
def test_any_name_of_a_class(tmp_path_factory, classes):
    """It is kept, and sorted with the others; or refused, if it does not fit into a line or a manifest."""
    folder = tmp_path_factory.mktemp("names")
    for seed, name in enumerate(classes):
        (folder / name).mkdir()
        (folder / name / "..a.png").write_bytes(png(seed)[0])
        (folder / name / f"-{name}.png").write_bytes(png(seed)[0])
    (folder / classes[0] / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / classes[0] / "pipe.png")
    splits = attempt(lambda: readers.image_folder(folder), folder)
    if re.search(r"[\x00-\x1f\x7f\udcff]", "".join(classes)):
        assert splits is None
        return
    found = content(splits)
    assert [name for name, pixels in found if pixels is not None] == sorted(classes)
    assert sum(pixels is None for _, pixels in found) == 2


@pytest.mark.parametrize("place", ["train/n01443537/images/x.png", "val/images/val_0.png"])
def test_a_pipe_among_the_files_does_not_hold_up(tiny, tmp_path, place):
    home = tmp_path / "tiny"
    shutil.copytree(tiny[0], home)
    (home / place).unlink(missing_ok=True)
    os.mkfifo(home / place)
    found = content(readers.tiny_imagenet(home))
    assert sum(pixels is None for _, pixels in found) == 1
