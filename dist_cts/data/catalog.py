"""The catalog: every data set by name, with its reader, its size and where to get it; and suites of them."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_cts.data import readers

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
EMBEDDED = "embedded:"


@dataclass(frozen=True)
class Entry:
    """A data set that launch/prepare.py can make a task of."""

    name: str
    read: Callable[[Path | None], readers.Split]
    where: str  # where to get it
    pixels: int | None = None  # the side that images are resized to by default; None: they all have one size, kept
    counts: tuple[int, int] | None = None  # train and test images of the whole data set; 0: it defines no test part
    needs_root: bool = True
    version: str = ""  # of a data set that is computed: two versions are not the same data


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            "tiny-imagenet",
            readers.tiny_imagenet,
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked",
            pixels=64,
            counts=(100_000, 10_000),
        ),
        Entry(
            "gtsrb",
            readers.gtsrb,
            "torchvision.datasets.GTSRB(ROOT, download=True)",
            pixels=32,
            counts=(26_640, 12_630),
        ),
        Entry(
            "fashion-mnist",
            partial(readers.idx, class_names=FASHION),
            "torchvision.datasets.FashionMNIST(ROOT, download=True), or Debian's package dataset-fashion-mnist",
            pixels=28,
            counts=(60_000, 10_000),
        ),
        Entry(
            "kmnist",
            partial(readers.idx, class_names=KUZUSHIJI),
            "torchvision.datasets.KMNIST(ROOT, download=True)",
            pixels=28,
            counts=(60_000, 10_000),
        ),
        Entry("image-folder", readers.image_folder, "your own images, in a folder for each class", pixels=64),
        Entry(
            "digits",
            readers.digits,
            "comes with scikit-learn",
            pixels=8,
            counts=(1_797, 0),
            needs_root=False,
        ),
    )
}


def entry(name: str) -> Entry:
    """The data set of that name; `embedded:TASK` is one of dist_cts.data.embedded.

    Raises:
        ValueError: there is none.
    """
    if name in CATALOG:
        return CATALOG[name]
    from dist_cts.data import embedded

    if name.removeprefix(EMBEDDED) in embedded.TASKS and name.startswith(EMBEDDED):
        return Entry(
            name,
            partial(readers.embedded, name=name.removeprefix(EMBEDDED)),
            "drawn by dist_cts.data.embedded",
            needs_root=False,
            version=f"{zlib.crc32(Path(embedded.__file__).read_bytes()):08x}",
        )
    known = ", ".join([*CATALOG, *(EMBEDDED + task for task in embedded.TASKS)])
    raise ValueError(f"there is no data set {name!r}; there are {known}")


def suite(name: str) -> list[Entry]:
    """The data sets of a suite.

    Raises:
        ValueError: there is none of that name.
    """
    if name != "demo":
        raise ValueError(f"there is no suite {name!r}; there is demo")
    from dist_cts.data import embedded

    return [entry(EMBEDDED + task) for task in embedded.TASKS]
