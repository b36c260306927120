"""Readers: from the original layout of a dataset to labelled train and test images.

A reader takes a folder and returns (train, test), or (everything, None) if the dataset defines no split. Classes are
sorted by name unless the dataset numbers them; images are sorted by class and path, or follow the dataset's own list.
"""

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePath

import numpy as np

from dist_cts.data.prepare.archives import Files, NotThere, locate
from dist_cts.data.prepare.raw import RawDataset, RawSplits, from_files, inside
from dist_cts.seeds import hashed_seed

PACKS = 1032  # the largest compression ratio of deflate
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def tiny_imagenet(root: Path) -> RawSplits:
    """TinyImageNet: train/WNID/images, and val as test, labelled by val/val_annotations.txt."""
    layout = "wnids.txt, train/WNID/images and val/val_annotations.txt, or tiny-imagenet-200.zip"
    files = locate(root, dict.fromkeys(("wnids.txt", "train", "val"), "tiny-imagenet-200.zip"), layout)
    wnids = sorted(files.text("wnids.txt").split())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = [
        (name, label_of[name.split("/")[1]])
        for name in files.below("train")
        if PurePath(name).suffix.lower() in IMAGES and name.split("/")[1] in label_of
    ]
    if not wnids or len(label_of) < len(wnids) or len({label for _, label in train}) < len(wnids):
        raise ValueError(f"{files.home}/wnids.txt: empty, or names a class twice or without images in train")
    test = []
    for number, line in enumerate(files.text("val/val_annotations.txt").splitlines(), 1):
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in label_of:
            raise ValueError(f"{files.home}/val/val_annotations.txt: line {number}: no class of wnids.txt")
        test.append((f"val/images/{columns[0]}", label_of[columns[1]]))
    there = [name for name in files.below("val/images") if PurePath(name).suffix.lower() in IMAGES]
    if there != sorted(name for name, _ in test):
        raise ValueError(f"{files.home}/val/val_annotations.txt: does not list each image of val/images exactly once")
    return files.dataset(wnids, train), files.dataset(wnids, test)


def stanford_dogs(root: Path) -> RawSplits:
    """Stanford Dogs: Images/WNID-BREED, train_list.mat, test_list.mat; classes sorted by folder name."""
    layout = "Images/WNID-BREED, train_list.mat and test_list.mat, or images.tar and lists.tar"
    files = locate(root, {"Images": "images.tar", "train_list.mat": "lists.tar", "test_list.mat": "lists.tar"}, layout)
    lists = [
        [str(name) for name in np.atleast_1d(_matlab(files, f"{split}_list.mat", "file_list"))]
        for split in ("train", "test")
    ]
    names = sorted({name.split("/")[0] for part in lists for name in part})
    label_of = {name: label for label, name in enumerate(names)}
    labelled = [[(f"Images/{name}", label_of[name.split("/")[0]]) for name in part] for part in lists]
    return files.dataset(names, labelled[0]), files.dataset(names, labelled[1])


def cub(root: Path) -> RawSplits:
    """CUB-200-2011: images.txt, image_class_labels.txt and train_test_split.txt; classes in the dataset's order."""
    lists = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    layout = f"{', '.join(lists)} and images/CLASS, or CUB_200_2011.tgz"
    files = locate(root, dict.fromkeys((*lists, "images"), "CUB_200_2011.tgz"), layout)
    classes, images, labels, train = (_numbered(files, name) for name in lists)
    if not images.keys() == labels.keys() == train.keys():
        raise ValueError(f"{files.home}: {', '.join(lists[1:])} do not list the same images")
    number = {key: label for label, key in enumerate(classes)}  # in file order: 001.Black_footed_Albatross, ...
    if unknown := set(labels.values()) - set(number):
        raise ValueError(f"{files.home}/image_class_labels.txt: class {min(unknown)} is not in classes.txt")
    parts = [
        [(f"images/{path.strip()}", number[labels[key]]) for key, path in images.items() if train[key] == part]
        for part in ("1", "0")
    ]
    return files.dataset(list(classes.values()), parts[0]), files.dataset(list(classes.values()), parts[1])


def stanford_cars(root: Path) -> RawSplits:
    """Stanford Cars: cars_train, cars_test and their annotations; classes as numbered by cars_meta.mat."""
    test_labels, train_labels = "cars_test_annos_withlabels.mat", "cars_train_annos.mat"
    devkit = dict.fromkeys(("cars_meta.mat", train_labels), "car_devkit.tgz")
    parts = {"cars_train": "cars_train.tgz", "cars_test": "cars_test.tgz"} | devkit | {test_labels: test_labels}
    files = locate(root, parts, "cars_train, cars_test, devkit (or their .tgz) and cars_test_annos_withlabels.mat")
    names = [str(name) for name in np.atleast_1d(_matlab(files, "cars_meta.mat", "class_names"))]
    splits = []
    for folder, table in (("cars_train", train_labels), ("cars_test", test_labels)):
        rows = np.atleast_1d(_matlab(files, table, "annotations"))
        try:
            labelled = [(f"{folder}/{row['fname']}", int(row["class"]) - 1) for row in rows]
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{files.home}/{table}: cannot be read: {error}") from None
        if wrong := [label + 1 for _, label in labelled if not 0 <= label < len(names)]:
            raise ValueError(f"{files.home}/{table}: class {wrong[0]}, expected 1..{len(names)}")
        splits.append(files.dataset(names, labelled))
    return splits[0], splits[1]


def quickdraw(root: Path, images: int = 100, seed: int = 0) -> RawSplits:
    """QuickDraw's NumPy bitmaps, CLASS.npy of uint8 [N, 784]; train and test get `images` random drawings per class.

    The choice depends on the seed and the class name only.
    """
    paths = {path.stem.removeprefix("full_numpy_bitmap_"): path for path in root.rglob("*.npy")}
    if not paths:
        raise NotThere(f"{root}: no CLASS.npy files found")
    names, pixels, chosen = sorted(paths), [], []
    for name in names:
        try:
            drawings = np.lib.format.open_memmap(paths[name], "r")
        except Exception as error:  # damaged files raise almost anything
            raise ValueError(f"{paths[name]}: cannot be read: {' '.join(str(error).split())}") from None
        if drawings.dtype != np.uint8 or drawings.ndim != 2 or drawings.shape[1] != 784:
            raise ValueError(f"{paths[name]}: {drawings.dtype} {list(drawings.shape)}, expected uint8 [N, 784]")
        if len(drawings) < 2 * images:
            raise ValueError(f"{paths[name]}: {len(drawings)} drawings, expected at least {2 * images}")
        random = np.random.default_rng(hashed_seed("quickdraw", seed, name))
        chosen.append(random.choice(len(drawings), 2 * images, replace=False))
        pixels.append(drawings)

    def part(first: int) -> RawDataset:
        rows = [(label, row) for label, rows in enumerate(chosen) for row in np.sort(rows[first : first + images])]
        labels = np.array([label for label, _ in rows], np.int64)
        return RawDataset(tuple(names), labels, lambda i: np.array(pixels[rows[i][0]][rows[i][1]]).reshape(28, 28))

    return part(0), part(images)


def imagenet(root: Path, split: int | None = None) -> RawSplits:
    """ImageNet-1k: train/WNID, and val/WNID as test; all classes, or those of one of the eight splits.

    If only the original archives exist, torchvision first extracts them into train and val beside them.
    """
    homes = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    home = next((folder for folder in homes if all((folder / part).is_dir() for part in ("train", "val"))), None)
    if home is None:
        archives = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
        if not all((root / name).exists() for name in archives):
            raise NotThere(f"{root}: neither train/WNID and val/WNID nor all of {', '.join(archives)} found")
        from torchvision.datasets import ImageNet

        for part in ("train", "val"):
            ImageNet(root, part)
        home = root
    wnids = imagenet_split(split) if split else None
    parts = []
    for part in ("train", "val"):
        found = {path.name for path in (home / part).iterdir() if path.is_dir()}
        names = wnids or sorted(found)
        if lacking := set(names) - found:
            raise ValueError(f"{home / part}: {len(lacking)} classes are missing, such as {min(lacking)}")
        parts.append(
            (names, [(path, label) for label, name in enumerate(names) for path in _images(home / part / name)])
        )
    if parts[0][0] != parts[1][0]:
        raise ValueError(f"{home}: train and val have different classes")
    return from_files(*parts[0]), from_files(*parts[1])


def imagenet_split(number: int) -> list[str]:
    """The sorted WordNet ids of one of the eight ImageNet splits, 1 to 8 (paper, supplement, Table 4)."""
    text = (resources.files("dist_cts.data.prepare") / "imagenet_splits" / f"{number}.txt").read_text()
    return [line.split()[0] for line in text.splitlines() if line.startswith("n")]


def gtsrb(root: Path) -> RawSplits:
    """German traffic signs in torchvision's layout: GTSRB/Training/CLASS/*.ppm and GT-final_test.csv."""
    home = _find(root, "GTSRB/Training", "GTSRB/Training/CLASS, GTSRB/Final_Test/Images and GT-final_test.csv")
    names, train = _class_folders(home / "GTSRB" / "Training")
    table, test = home / "GT-final_test.csv", []
    label_of = {str(label): label for label in range(len(names))}
    for number, row in enumerate(csv.DictReader(_text(table).splitlines(), delimiter=";"), 2):
        if row.get("ClassId") not in label_of or not row.get("Filename"):
            raise ValueError(f"{table}: line {number}: no Filename, or ClassId not in 0..{len(names) - 1}")
        path = inside(home / "GTSRB" / "Final_Test" / "Images", row["Filename"])
        test.append((path, label_of[row["ClassId"]]))
    if len({path for path, _ in test}) < len(test):
        raise ValueError(f"{table}: lists an image twice")
    return from_files(names, train), from_files(names, test)


def image_folder(root: Path) -> RawSplits:
    """CLASS/**/IMAGE in the folders train and test (or val) or, without these, in the root."""
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder with one subfolder of images per class; for a file: table")
    if not (root / "train").is_dir():
        return from_files(*_class_folders(root)), None
    names, train = _class_folders(root / "train")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        return from_files(names, train), None
    found, files = _class_folders(held_out)
    if unknown := set(found) - set(names):
        raise ValueError(f"{held_out}: class {min(unknown)} does not exist in {root / 'train'}")
    return from_files(names, train), from_files(names, [(path, names.index(found[i])) for path, i in files])


def idx(root: Path, class_names: Sequence[str]) -> RawSplits:
    """IDX files (the format of MNIST), gzipped or not, anywhere in the folder; a single pair defines no split."""
    pairs = {}
    for path in sorted(root.rglob("*images*idx3*")):
        if path.is_file():
            pairs.setdefault(path.parent / path.name.removesuffix(".gz"), path)
    held_out = [path for path in pairs.values() if "t10k" in path.name or "test" in path.name]
    train = [path for path in pairs.values() if path not in held_out]
    if not pairs:
        raise NotThere(f"{root}: no *images-idx3-ubyte or *images-idx3-ubyte.gz found")
    if len(train) > 1 or len(held_out) > 1:
        raise ValueError(f"{root}: IDX files of several datasets: {', '.join(map(str, pairs.values()))}")
    parts = [_idx_pair(path, class_names) for path in train + held_out]
    return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], None)


def download_idx(root: Path, name: str) -> None:
    """Downloads Fashion-MNIST or KMNIST through torchvision into ROOT/NAME/raw."""
    from torchvision import datasets

    for train in (True, False):
        getattr(datasets, name)(root, train=train, download=True)


def digits(root: Path | None) -> RawSplits:
    """The 1,797 handwritten digits, 8 x 8, included in scikit-learn; needs no folder."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels in the source
    return RawDataset(tuple("0123456789"), labels.astype(np.int64), pixels.__getitem__), None


def embedded(root: Path | None, name: str) -> RawSplits:
    """A task of dist_cts.data.prepare.embedded; needs no folder."""
    from dist_cts.data.prepare.embedded import make

    train, test = make(name)
    return tuple(RawDataset(tuple(part.class_names), part.labels, part.images.__getitem__) for part in (train, test))


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not.

    Raises:
        ValueError: it is damaged, or not an IDX file of bytes; the message names it.
    """
    most = path.stat().st_size * (PACKS if path.suffix == ".gz" else 1)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic = file.read(4)
            sizes = file.read(4 * magic[3]) if len(magic) == 4 else b""
            if magic[:3] != b"\0\0\x08" or not sizes or len(sizes) < 4 * magic[3]:
                raise ValueError(f"{path}: not an IDX file of bytes")
            shape = np.frombuffer(sizes, ">u4").tolist()
            size = math.prod(shape)
            body = file.read(min(size, most) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if len(body) != size:
        raise ValueError(f"{path}: {len(body)} bytes of data, expected {shape} from its header")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_pair(images: Path, class_names: Sequence[str]) -> RawDataset:
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = next((path for path in (images.with_name(name), images.with_name(name + ".gz")) if path.exists()), None)
    if labels is None:
        raise ValueError(f"{images}: label file {name} not found beside it")
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise ValueError(f"{images}: images {list(pixels.shape)} do not match labels {list(classes.shape)} in {labels}")
    if classes.max(initial=0) >= len(class_names):
        raise ValueError(f"{labels}: label {classes.max()}, expected 0..{len(class_names) - 1}")
    return RawDataset(tuple(class_names), classes.astype(np.int64), pixels.__getitem__)


def _find(root: Path, landmark: str, layout: str) -> Path:
    """The folder that contains `landmark`: the root or one of its subfolders."""
    for folder in (root, *sorted(root.iterdir())):
        if (folder / landmark).exists():
            return folder
    raise NotThere(f"{root}: {landmark} not found in it or its subfolders; expected layout: {layout}")


def _class_folders(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The sorted names of the class folders, and every image below them with its label."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    if not names:
        raise ValueError(f"{folder}: no class folders found; expected one subfolder of images per class")
    if broken := [name for name in names if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name)]:
        raise ValueError(f"{folder}: class name {broken[0]!r} is not UTF-8 or has control characters; rename it")
    return names, [(path, label) for label, name in enumerate(names) for path in _images(folder / name)]


def _images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.name[0] != ".")
    if not files:
        raise ValueError(f"{folder}: no images found")
    return files


def _numbered(files: Files, name: str) -> dict[str, str]:
    """The lines `number value` of a file as a mapping."""
    rows = [line.split(maxsplit=1) for line in files.text(name).splitlines() if line.strip()]
    if len({row[0] for row in rows if len(row) == 2}) < len(rows):
        raise ValueError(f"{files.home / name}: a line is not `number value`, or a number occurs twice")
    return dict(rows)


def _matlab(files: Files, name: str, variable: str) -> np.ndarray:
    from scipy.io import loadmat

    data = files.bytes(name)
    try:
        return loadmat(io.BytesIO(data), squeeze_me=True)[variable]
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{files.home / name}: cannot be read: {' '.join(str(error).split())}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
