"""The catalog: every dataset by name, with its reader; catalog.yaml says what is known of it and where to get it."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_cts.data.prepare import readers, tables, torchvision_sets
from dist_cts.data.prepare.raw import RawSplits
from dist_cts.yaml_file import read_yaml

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
EMBEDDED = "embedded:"
READERS: dict[str, Callable] = {
    "tiny-imagenet": readers.tiny_imagenet,
    "stanford-dogs": readers.stanford_dogs,
    "cub": readers.cub,
    "stanford-cars": readers.stanford_cars,
    "quickdraw": readers.quickdraw,
    "imagenet": readers.imagenet,
    **{f"imagenet-{split}": partial(readers.imagenet, split=split) for split in range(1, 9)},
    "gtsrb": readers.gtsrb,
    "fashion-mnist": partial(readers.idx, class_names=FASHION),
    "kmnist": partial(readers.idx, class_names=KUZUSHIJI),
    "image-folder": readers.image_folder,
    "table": tables.read,
    "digits": readers.digits,
}
DOWNLOADS: dict[str, Callable] = {
    "fashion-mnist": partial(readers.download_idx, name="FashionMNIST"),
    "kmnist": partial(readers.download_idx, name="KMNIST"),
}
_arrays, _files = torchvision_sets.arrays, torchvision_sets.files
TORCHVISION: dict[str, Callable] = {  # read and downloaded by torchvision
    "cifar100": partial(_arrays, name="CIFAR100", splits=(True, False), class_names=()),
    "cifar10": partial(_arrays, name="CIFAR10", splits=(True, False), class_names=()),
    "aircraft": partial(_files, name="FGVCAircraft", train=["trainval"], test=["test"]),
    "svhn": partial(_arrays, name="SVHN", splits=("train", "test"), class_names=torchvision_sets.DIGITS),
    "flowers": partial(_files, name="Flowers102", train=["train", "val"], test=["test"]),
    "pets": torchvision_sets.pets,
    "stl10": partial(_arrays, name="STL10", splits=("train", "test"), class_names=STL10),
    "food101": partial(_files, name="Food101", train=["train"], test=["test"]),
    "dtd": partial(_files, name="DTD", train=["train", "val", "test"], test=[]),
}


@dataclass(frozen=True)
class Entry:
    """A dataset that dist-cts prepare can turn into a task."""

    name: str
    read: Callable[[Path | None], RawSplits]
    where: str  # where to get it
    pixels: int | None = None  # default side of the resized images; None: keep their common size
    counts: tuple[int, int] | None = None  # train and test images of the full dataset; 0: no test part defined
    classes: int | None = None
    channels: int = 3
    test_fraction: float = 0.2  # of each class, if the dataset defines no test part
    citation: str = ""
    licence: str = ""  # as stated by its authors
    note: str = ""
    folder: str = ""  # its folder below the root of several datasets, if not `name`
    download: Callable[[Path], object] | None = None  # downloads into a folder and verifies checksums
    needs_root: bool = True
    version: str = ""  # of a generated dataset: different versions give different data


def _entry(name: str, facts: dict) -> Entry:
    if counts := facts.pop("counts", None):
        facts["counts"] = tuple(counts)
    if name not in TORCHVISION:
        return Entry(name, READERS[name], download=DOWNLOADS.get(name), needs_root=name != "digits", **facts)
    read = TORCHVISION[name]
    where = f"dist-cts prepare {name} --download --root RAW --out BETON_DIR ({facts.pop('where')})"
    return Entry(name, partial(read, download=False), where, download=partial(read, download=True), **facts)


_FACTS = read_yaml(Path(__file__).with_name("catalog.yaml"))
CATALOG = {name: _entry(name, dict(facts)) for name, facts in _FACTS.items()}


def entry(name: str) -> Entry:
    """The dataset of that name; `embedded:TASK` is a task of dist_cts.data.prepare.embedded.

    Raises:
        ValueError: unknown dataset.
    """
    if name in CATALOG:
        return CATALOG[name]
    from dist_cts.data.prepare import embedded

    if name.removeprefix(EMBEDDED) in embedded.TASKS and name.startswith(EMBEDDED):
        return Entry(
            name,
            partial(readers.embedded, name=name.removeprefix(EMBEDDED)),
            "drawn by dist_cts.data.prepare.embedded",
            needs_root=False,
            version=embedded.VERSION,
        )
    known = [*CATALOG, *(EMBEDDED + task for task in embedded.TASKS)]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if Path(name).is_dir():
        hint = f"for a folder with one subfolder of images per class: dist-cts prepare image-folder --root {name}; "
    raise ValueError(f"unknown dataset {name!r}; {hint}known: {', '.join(known)}")
