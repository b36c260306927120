"""Readers of the paper's datasets, each on a tiny copy of the original layout, extracted and as archives."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from dist_cts.data.prepare import catalog, raw, readers
from dist_cts.data.prepare.archives import NotThere
from tests.data.test_readers import check, make_tiny_imagenet, save


def read(name, root):
    return catalog.entry(name).read(root)


def pack(archive, home, *parts):
    """Moves the parts of a folder into an archive beside it."""
    files = [path for part in parts for path in [home / part, *sorted((home / part).rglob("*"))]]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in files:
                file.write(path, path.relative_to(home.parent))
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".tgz" else "w") as file:
            for path in files:
                file.add(path, path.relative_to(home.parent), recursive=False)
    for path in reversed(files):
        path.rmdir() if path.is_dir() else path.unlink()


def cells(*texts):
    """A column of MATLAB strings."""
    return np.array([[text] for text in texts], dtype=object)


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet_zip(tmp_path, packed):
    train, test = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    if packed:
        pack(tmp_path / "tiny-imagenet-200.zip", tmp_path / "tiny-imagenet-200", ".")
        assert not (tmp_path / "tiny-imagenet-200/wnids.txt").exists()
    for root in [tmp_path, tmp_path / "tiny-imagenet-200.zip"][: 1 + packed]:
        parts = read("tiny-imagenet", root)
        check(parts[0], train)
        check(parts[1], test)


@pytest.mark.parametrize("packed", [False, True])
def test_stanford_dogs(tmp_path, packed):
    home, breeds = tmp_path / "dogs", ["n02-b_hound", "n01-Zed"]
    home.mkdir()
    pixels = {
        f"{breed}/{i}.jpg": save(home / "Images" / breed / f"{i}.jpg", hash((breed, i)) % 99, (8, 6))
        for breed in breeds
        for i in range(3)
    }
    lists = {"train": ["n02-b_hound/1.jpg", "n01-Zed/0.jpg", "n01-Zed/2.jpg"], "test": ["n01-Zed/1.jpg"]}
    for split, names in lists.items():
        savemat(home / f"{split}_list.mat", {"file_list": cells(*names)})
    if packed:
        pack(home / "images.tar", home, "Images")
        pack(home / "lists.tar", home, "train_list.mat", "test_list.mat")
    for part, names in zip(read("stanford-dogs", tmp_path), lists.values(), strict=True):
        assert part.class_names == ("n01-Zed", "n02-b_hound")
        check(part, [(int(name.startswith("n02")), pixels[name]) for name in names])


@pytest.mark.parametrize("packed", [False, True])
def test_cub(tmp_path, packed):
    home = tmp_path / "CUB_200_2011"
    names = ["002.Owl/b.jpg", "001.Tit/a.jpg", "001.Tit/c.jpg"]
    pixels = [save(home / "images" / name, i, grey=i == 2) for i, name in enumerate(names)]
    (home / "classes.txt").write_text("1 001.Tit\n2 002.Owl\n")
    (home / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (home / "image_class_labels.txt").write_text("1 2\n2 1\n3 1\n")
    (home / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    if packed:
        pack(
            tmp_path / "CUB_200_2011.tgz",
            home,
            "classes.txt",
            "images.txt",
            "image_class_labels.txt",
            "train_test_split.txt",
            "images",
        )
    train, test = read("cub", tmp_path)
    assert train.class_names == ("001.Tit", "002.Owl")
    check(train, [(1, pixels[0]), (0, pixels[2])])
    check(test, [(0, pixels[1])])
    if not packed:
        (home / "train_test_split.txt").write_text("1 1\n2 0\n")
        with pytest.raises(ValueError, match="do not list the same images"):
            read("cub", home)


def make_cars(home, names=("Z car", "A car"), labels=((2, 1), (1,))):
    expected = []
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit/cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    tables = ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    for folder, table, classes in zip(("cars_train", "cars_test"), tables, labels, strict=True):
        rows = [(1, 2, 3, 4, label, f"{i:05}.jpg") for i, label in enumerate(classes, 1)]
        kinds = [(key, object) for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        savemat(home / table, {"annotations": np.array([rows], dtype=kinds)})
        expected.append([(row[4] - 1, save(home / folder / row[5], i + len(folder))) for i, row in enumerate(rows)])
    return expected


@pytest.mark.parametrize("packed", [False, True])
def test_stanford_cars(tmp_path, packed):
    home = tmp_path / "stanford_cars"
    train, test = make_cars(home)
    if packed:
        for archive, part in (("cars_train", "cars_train"), ("cars_test", "cars_test"), ("car_devkit", "devkit")):
            pack(home / f"{archive}.tgz", home, part)
    parts = read("stanford-cars", tmp_path)
    assert parts[0].class_names == parts[1].class_names == ("Z car", "A car")  # its own numbers, not sorted
    check(parts[0], train)
    check(parts[1], test)


def test_cars_with_a_class_that_is_none(tmp_path):
    make_cars(tmp_path / "stanford_cars", labels=((2, 3), (1,)))
    with pytest.raises(ValueError, match=r"cars_train_annos\.mat: class 3, expected 1\.\.2"):
        read("stanford-cars", tmp_path)


def test_quickdraw_draws_100_and_100_a_class_by_seed(tmp_path):
    drawings = {}
    for name, count in (("full_numpy_bitmap_zebra", 210), ("ant", 200)):
        rows = np.random.default_rng(count).integers(0, 256, (count, 784), np.uint8)
        np.save(tmp_path / f"{name}.npy", rows)
        drawings[name.removeprefix("full_numpy_bitmap_")] = [row.tobytes() for row in rows]
    train, test = read("quickdraw", tmp_path)
    assert train.class_names == test.class_names == ("ant", "zebra")
    chosen = []
    for part in (train, test):
        assert part.labels.tolist() == [0] * 100 + [1] * 100
        images = [part.load(i) for i in range(200)]
        assert images[0].shape == (28, 28)
        places = [drawings[part.class_names[part.labels[i]]].index(image.tobytes()) for i, image in enumerate(images)]
        assert places[:100] == sorted(places[:100])
        assert places[100:] == sorted(places[100:])
        chosen.append(places)
    assert sorted(chosen[0][:100] + chosen[1][:100]) == list(range(200))
    assert len(set(chosen[0][100:] + chosen[1][100:])) == 200
    again = read("quickdraw", tmp_path)[0]
    other = readers.quickdraw(tmp_path, seed=1)[0]
    assert all((again.load(i) == train.load(i)).all() for i in range(200))
    assert not all((other.load(i) == train.load(i)).all() for i in range(200))


def test_quickdraw_faults_name_the_file(tmp_path):
    with pytest.raises(NotThere, match=r"no CLASS\.npy"):
        read("quickdraw", tmp_path)
    np.save(tmp_path / "ant.npy", np.zeros((199, 784), np.uint8))
    with pytest.raises(ValueError, match=r"ant\.npy: 199 drawings, expected at least 200"):
        read("quickdraw", tmp_path)
    np.save(tmp_path / "ant.npy", np.zeros((200, 783), np.uint8))
    with pytest.raises(ValueError, match=r"ant\.npy: uint8 \[200, 783\]"):
        read("quickdraw", tmp_path)
    (tmp_path / "ant.npy").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"ant\.npy: cannot be read"):
        read("quickdraw", tmp_path)


def test_imagenet_and_one_of_its_splits(tmp_path):
    wnids = readers.imagenet_split(6)
    pixels = {}
    for part in ("train", "val"):
        for number, wnid in enumerate([*wnids, "n01440764"]):  # a tench, of another split
            pixels[part, wnid] = save(tmp_path / "imagenet" / part / wnid / f"{wnid}_{number}.JPEG", number)
    for part, data in zip(("train", "val"), read("imagenet-6", tmp_path / "imagenet"), strict=True):
        assert data.class_names == tuple(wnids)
        check(data, [(label, pixels[part, wnid]) for label, wnid in enumerate(wnids)])
    assert readers.imagenet(tmp_path)[0].class_names == tuple(sorted([*wnids, "n01440764"]))
    with pytest.raises(ValueError, match="113 classes are missing"):
        read("imagenet-1", tmp_path)
    with pytest.raises(NotThere, match="ILSVRC2012_img_train"):
        read("imagenet-1", tmp_path / "imagenet/train")


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision without checksums, which files of a few images cannot have."""
    for module in ("cifar", "svhn", "stl10", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, unchecked, name):
    hundred = name == "cifar100"
    home = tmp_path / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    home.mkdir()
    key, names = ("fine_labels", "fine_label_names") if hundred else ("labels", "label_names")
    images = {}
    batches = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, batch in enumerate(batches):
        rows = noise(2 + number, 3072)
        images[batch] = [(i % 2, row.reshape(3, 32, 32).transpose(1, 2, 0)) for i, row in enumerate(rows)]
        (home / batch).write_bytes(pickle.dumps({"data": rows, key: [label for label, _ in images[batch]]}))
    (home / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps({names: ["pear", "apple"]}))
    train, test = read(name, tmp_path)
    assert train.class_names == ("pear", "apple")
    check(train, [image for batch in batches[:-1] for image in images[batch]])
    check(test, images[batches[-1]])


def test_svhn(tmp_path, unchecked):
    expected = []
    for split, labels in (("train", [10, 1, 9]), ("test", [3, 10])):
        pixels = noise(32, 32, 3, len(labels))
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array(labels)[:, None]})
        expected.append([(label % 10, pixels[..., i]) for i, label in enumerate(labels)])
    for part, images in zip(read("svhn", tmp_path), expected, strict=True):
        assert part.class_names == tuple("0123456789")
        check(part, images)


def test_stl10(tmp_path, unchecked):
    home, expected = tmp_path / "stl10_binary", []
    home.mkdir()
    for split, labels in (("train", [10, 1]), ("test", [3])):
        pixels = noise(len(labels), 96, 96, 3)
        pixels.transpose(0, 3, 2, 1).tofile(home / f"{split}_X.bin")  # channels, then columns, then rows
        np.array(labels, np.uint8).tofile(home / f"{split}_y.bin")
        expected.append([(label - 1, image) for label, image in zip(labels, pixels, strict=True)])
    for part, images in zip(read("stl10", tmp_path), expected, strict=True):
        assert part.class_names[0] == "airplane"
        check(part, images)


def test_aircraft(tmp_path):
    home = tmp_path / "fgvc-aircraft-2013b/data"
    pixels = {name: save(home / "images" / f"{name}.jpg", i) for i, name in enumerate("abc")}
    (home / "variants.txt").write_text("Z-1\nA 2\n")
    (home / "images_variant_trainval.txt").write_text("c A 2\na Z-1\n")
    (home / "images_variant_test.txt").write_text("b A 2\n")
    train, test = read("aircraft", tmp_path)
    assert train.class_names == ("Z-1", "A 2")
    check(train, [(1, pixels["c"]), (0, pixels["a"])])
    check(test, [(1, pixels["b"])])


def test_flowers_train_is_train_and_val(tmp_path, unchecked):
    home = tmp_path / "flowers-102"
    pixels = [save(home / f"jpg/image_{i:05}.jpg", i) for i in range(1, 7)]
    savemat(home / "imagelabels.mat", {"labels": np.array([[1, 102, 1, 102, 2, 3]])})
    savemat(home / "setid.mat", {"trnid": [[4, 1]], "valid": [[2, 3]], "tstid": [[6, 5]]})
    train, test = read("flowers", tmp_path)
    assert (len(train.class_names), train.class_names[0]) == (102, "pink primrose")
    check(train, [(101, pixels[3]), (0, pixels[0]), (101, pixels[1]), (0, pixels[2])])
    check(test, [(2, pixels[5]), (1, pixels[4])])


def test_pets(tmp_path):
    home = tmp_path / "oxford-iiit-pet"
    names = ["pug_2", "Abyssinian_1", "pug_1"]
    pixels = {name: save(home / f"images/{name}.jpg", i) for i, name in enumerate(names)}
    (home / "annotations").mkdir()
    (home / "annotations/trainval.txt").write_text("pug_2 2 2 1\nAbyssinian_1 1 1 1\n")
    (home / "annotations/test.txt").write_text("pug_1 2 2 1\nAbyssinian_1 1 1 1\n")
    train, test = read("pets", tmp_path)
    assert train.class_names == ("Abyssinian", "Pug")
    check(train, [(1, pixels["pug_2"]), (0, pixels["Abyssinian_1"])])
    check(test, [(1, pixels["pug_1"]), (0, pixels["Abyssinian_1"])])


def test_food101(tmp_path):
    home = tmp_path / "food-101"
    pixels = {name: save(home / f"images/{name}.jpg", i) for i, name in enumerate(["pie/2", "pie/1", "apple/7"])}
    (home / "meta").mkdir()
    (home / "meta/train.json").write_text(json.dumps({"pie": ["pie/2"], "apple": ["apple/7"]}))
    (home / "meta/test.json").write_text(json.dumps({"apple": ["apple/7"], "pie": ["pie/1"]}))
    train, test = read("food101", tmp_path)
    assert train.class_names == ("apple", "pie")
    check(train, [(1, pixels["pie/2"]), (0, pixels["apple/7"])])
    check(test, [(0, pixels["apple/7"]), (1, pixels["pie/1"])])


def test_dtd_is_one_part_of_which_a_quarter_is_drawn(tmp_path):
    home = tmp_path / "dtd/dtd"
    (home / "labels").mkdir(parents=True)
    expected = []
    for part in ("train", "val", "test"):
        names = [f"{cls}/{cls}_{part}.jpg" for cls in ("woven", "dotted")]
        expected += [(int(i == 0), save(home / "images" / name, len(expected) + i)) for i, name in enumerate(names)]
        (home / f"labels/{part}1.txt").write_text("\n".join(names) + "\n")
    everything, rest = read("dtd", tmp_path)
    assert rest is None
    assert everything.class_names == ("dotted", "woven")
    check(everything, expected)
    labels = np.repeat(np.arange(47), 120)
    whole = raw.RawDataset(tuple(map(str, range(47))), labels, lambda i: None)
    entry = catalog.entry("dtd")
    assert tuple(map(len, raw.split(whole, entry.test_fraction, 0))) == entry.counts == (4230, 1410)


@pytest.mark.parametrize(
    "name",
    ["cifar100", "cifar10", "svhn", "stl10", "aircraft", "flowers", "pets", "food101", "dtd", "stanford-dogs", "cub",
     "stanford-cars", "quickdraw", "imagenet", "imagenet-3", "tiny-imagenet", "gtsrb", "kmnist", "fashion-mnist"],
)  # fmt: skip
def test_what_is_not_there_is_told_from_what_is_damaged(tmp_path, name):
    with pytest.raises(NotThere):
        read(name, tmp_path)


@pytest.mark.parametrize("archive", ["CUB_200_2011.tgz"])
def test_damaged_archives_are_named(tmp_path, archive):
    for damage in (b"<html>", gzip.compress(b"x" * 5000), gzip.compress(b"x" * 5000)[:30]):
        (tmp_path / archive).write_bytes(damage)
        with pytest.raises(ValueError, match=f"{archive}: cannot be read"):
            read("cub", tmp_path)


def test_images_in_archives_that_do_not_decode_are_named(tmp_path):
    home = tmp_path / "tiny-imagenet-200"
    make_tiny_imagenet(home)
    (home / "train/n01/images/n01_0.JPEG").write_bytes(b"text")
    pack(tmp_path / "tiny-imagenet-200.zip", home, ".")
    train, _ = read("tiny-imagenet", tmp_path)
    with pytest.raises(ValueError, match=r"train/n01/images/n01_0\.JPEG: cannot be decoded"):
        train.load(0)


def test_download_is_torchvisions(tmp_path, monkeypatch):
    asked = []

    class Set:
        data, targets, classes = np.zeros((1, 32, 32, 3), np.uint8), [0], ["a"]

        def __init__(self, root, train, download):
            asked.append((root, train, download))

    monkeypatch.setattr(datasets, "CIFAR100", Set)
    catalog.entry("cifar100").download(tmp_path)
    assert asked == [(tmp_path, True, True), (tmp_path, False, True)]


def test_the_imagenet_splits_have_the_papers_counts_and_share_nothing():
    splits = [readers.imagenet_split(number) for number in range(1, 9)]
    assert list(map(len, splits)) == [113, 131, 121, 121, 120, 95, 155, 144]
    assert list(map(len, splits)) == [catalog.entry(f"imagenet-{number}").classes for number in range(1, 9)]
    assert len(set().union(*splits)) == 1000
    assert all(split == sorted(split) for split in splits)
    members = {"n01443537": 8, "n01530575": 1, "n02085620": 3, "n02123045": 3, "n02129165": 2, "n04254777": 7}
    for wnid, number in members.items():  # goldfish, brambling, Chihuahua, tabby, lion, sock
        assert wnid in splits[number - 1]


def test_exif_and_cmyk_images_in_an_archive_are_upright_rgb(tmp_path):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("CMYK", (4, 8)).save(buffer, "jpeg", exif=exif)
    image = raw.decode(io.BytesIO(buffer.getvalue()), "x")
    assert (image.mode, image.size) == ("RGB", (8, 4))
