import gzip
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dist_cts.data.prepare import readers

ABC = partial(readers.idx, class_names="abc")


def save(path, seed, size=(6, 6), grey=False):
    """A random image file; returns what it decodes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)
    return np.asarray(Image.open(path))


def save_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def check(data, expected):
    """expected: (label, pixels) of every image, in order."""
    assert data.labels.tolist() == [label for label, _ in expected]
    assert data.labels.dtype == np.int64
    for index, (_, pixels) in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(data.load(index)), pixels)


def make_tiny_imagenet(home):
    wnids = ["n03", "n01", "n02"]  # the original list is not sorted either
    home.mkdir(parents=True)
    (home / "wnids.txt").write_text("\n".join(wnids) + "\n")
    train = [
        (label, save(home / f"train/{wnid}/images/{wnid}_{i}.JPEG", 10 * label + i, grey=i == 1))
        for label, wnid in enumerate(sorted(wnids))
        for i in range(2)
    ]
    lines, test = [], []
    for i, label in enumerate([2, 0, 1, 0]):
        test.append((label, save(home / f"val/images/val_{i}.JPEG", 100 + i)))
        lines.append(f"val_{i}.JPEG\t{sorted(wnids)[label]}\t0\t32\t44\t62\n")
    (home / "val/val_annotations.txt").write_text("".join(lines))
    return train, test


@pytest.mark.parametrize("root", [".", ".."], ids=["itself", "its parent"])
def test_tiny_imagenet(tmp_path, root):
    home = tmp_path / "raw/tiny-imagenet-200"
    train, test = make_tiny_imagenet(home)
    read_train, read_test = readers.tiny_imagenet(home / root)
    assert read_train.class_names == read_test.class_names == ("n01", "n02", "n03")
    check(read_train, train)
    check(read_test, test)


def test_tiny_imagenet_with_an_unknown_class(tmp_path):
    make_tiny_imagenet(tmp_path / "t")
    with open(tmp_path / "t/val/val_annotations.txt", "a") as file:
        file.write("val_9.JPEG\tn99\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: line 5"):
        readers.tiny_imagenet(tmp_path / "t")


def make_gtsrb(home):
    train = [
        (label, save(home / f"GTSRB/Training/{label:05}/{i:05}.ppm", 10 * label + i, (5 + i, 7)))
        for label in range(3)
        for i in range(2)
    ]
    rows, test = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"], []
    for i, label in enumerate([2, 0, 1]):
        test.append((label, save(home / f"GTSRB/Final_Test/Images/{i:05}.ppm", 50 + i)))
        rows.append(f"{i:05}.ppm;6;6;0;0;5;5;{label}")
    (home / "GT-final_test.csv").write_text("\r\n".join(rows) + "\r\n")
    return train, test


@pytest.mark.parametrize("root", ["gtsrb", "."])
def test_gtsrb(tmp_path, root):
    train, test = make_gtsrb(tmp_path / "gtsrb")
    read_train, read_test = readers.gtsrb(tmp_path / root)
    assert read_train.class_names == ("00000", "00001", "00002")
    check(read_train, train)
    check(read_test, test)


@pytest.mark.parametrize("row", ["00009.ppm;6;6;0;0;5;5;3", "00009.ppm;6;6;0;0;5;5", "00009.ppm;6;6;0;0;5;5;x"])
def test_gtsrb_with_a_wrong_row(tmp_path, row):
    make_gtsrb(tmp_path / "gtsrb")
    with open(tmp_path / "gtsrb/GT-final_test.csv", "a") as file:
        file.write(row + "\r\n")
    with pytest.raises(ValueError, match=r"GT-final_test\.csv: line 5"):
        readers.gtsrb(tmp_path)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder_with_its_own_split(tmp_path, held_out):
    train = [(0, save(tmp_path / "train/ant/b.png", 1)), (0, save(tmp_path / "train/ant/deep/a.PNG", 2))]
    train.append((1, save(tmp_path / "train/bee/a.jpg", 3)))
    test = [(1, save(tmp_path / held_out / "bee/x.png", 4))]
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    (tmp_path / "train/.cache").mkdir()
    read_train, read_test = readers.image_folder(tmp_path)
    assert read_train.class_names == read_test.class_names == ("ant", "bee")
    check(read_train, train)
    check(read_test, test)


@pytest.mark.parametrize("home", [".", "train"])
def test_image_folder_without_a_split(tmp_path, home):
    names = ["1", "10", "2"]  # sorted as text
    expected = [(label, save(tmp_path / home / name / "i.png", label)) for label, name in enumerate(names)]
    everything, rest = readers.image_folder(tmp_path)
    assert rest is None
    assert everything.class_names == ("1", "10", "2")
    check(everything, expected)


def test_image_folder_faults(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        readers.image_folder(tmp_path)
    save(tmp_path / "train/ant/a.png", 0)
    save(tmp_path / "test/cow/a.png", 0)
    with pytest.raises(ValueError, match="class cow does not exist in"):
        readers.image_folder(tmp_path)
    (tmp_path / "train/bee").mkdir()
    with pytest.raises(ValueError, match=r"train/bee: no images found"):
        readers.image_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["-idx3-ubyte.gz", "-idx3-ubyte", ".idx3-ubyte"])
def test_idx_files_of_two_splits_in_any_folder(tmp_path, suffix):
    rng = np.random.default_rng(0)
    expected = {}
    for split, count in (("train", 5), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (count, 4, 4)), rng.integers(0, 3, count)
        save_idx(tmp_path / f"Any/raw/{split}-images{suffix}", images)
        save_idx(tmp_path / f"Any/raw/{split}-labels{suffix.replace('idx3', 'idx1')}", labels)
        expected[split] = list(zip(labels.tolist(), images, strict=True))
    train, test = ABC(tmp_path)
    check(train, expected["train"])
    check(test, expected["t10k"])
    assert train.class_names == ("a", "b", "c")


def test_a_single_idx_pair_has_no_split_and_both_forms_of_a_file_are_one(tmp_path):
    images, labels = np.arange(32).reshape(2, 4, 4), np.array([2, 0])
    for suffix in ("", ".gz"):
        save_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images)
        save_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", labels)
    everything, rest = ABC(tmp_path)
    assert rest is None
    check(everything, list(zip([2, 0], images, strict=True)))


def idx_pair(tmp_path, images=(2, 4, 4), labels=(0, 1)):
    save_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros(images))
    save_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array(labels))


def test_idx_faults_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="no \\*images-idx3-ubyte"):
        ABC(tmp_path)
    idx_pair(tmp_path, labels=(0, 3))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: label 3, expected 0\.\.2"):
        ABC(tmp_path)
    idx_pair(tmp_path, labels=(0, 1, 2))
    with pytest.raises(ValueError, match=r"images \[2, 4, 4\] do not match labels \[3\]"):
        ABC(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="label file train-labels-idx1-ubyte not found beside it"):
        ABC(tmp_path)
    idx_pair(tmp_path)
    idx_pair(tmp_path / "other")
    with pytest.raises(ValueError, match="several datasets"):
        ABC(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        lambda data: gzip.compress(b"\0\0\x08"),
        lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]),
        lambda data: b"<html>404",
    ],
    ids=["cut", "short", "no header", "floats", "a web page"],
)
def test_damaged_idx_files_are_named(tmp_path, damage):
    idx_pair(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        ABC(tmp_path)


@pytest.mark.parametrize("read", [readers.tiny_imagenet, readers.gtsrb])
def test_another_layout_is_an_error_that_shows_the_expected_one(tmp_path, read):
    with pytest.raises(ValueError, match="expected layout"):
        read(tmp_path)


def test_digits_are_scikit_learns():
    data, rest = readers.digits(None)
    assert rest is None
    assert (len(data), len(data.class_names)) == (1797, 10)
    assert data.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert data.load(0)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert max(data.load(i).max() for i in range(100)) == 255


def test_embedded_tasks_are_data_sets():
    train, test = readers.embedded(None, "colours")
    assert len(train) > len(test) > 0
    assert train.class_names == test.class_names
    assert train.load(0).dtype == np.uint8
