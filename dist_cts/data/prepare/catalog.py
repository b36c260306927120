"""The catalog: every dataset by name, with its reader, its size and its source."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_cts.data.prepare import readers, tables, torchvision_sets
from dist_cts.data.prepare.raw import RawSplits

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
EMBEDDED = "embedded:"
IMAGENET = (
    "https://image-net.org (needs an account): ILSVRC2012 train, val and devkit archives, "
    "or extracted into train/WNID and val/WNID"
)
IMAGENET_SPLITS = (  # train images, test images, classes (paper, supplement, Table 4)
    (146_741, 5_650, 113),
    (169_582, 6_550, 131),
    (151_773, 6_050, 121),
    (154_047, 6_050, 121),
    (154_373, 6_000, 120),
    (121_344, 4_750, 95),
    (198_314, 7_750, 155),
    (184_993, 7_200, 144),
)


@dataclass(frozen=True)
class Entry:
    """A dataset that launch/prepare.py can turn into a task."""

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


def _torchvision(name: str, read: Callable, where: str, **facts) -> Entry:
    """An entry for a dataset that torchvision downloads and reads."""
    return Entry(
        name,
        partial(read, download=False),
        f"launch/prepare.py {name} --download --root RAW --out BETON_DIR ({where})",
        download=partial(read, download=True),
        **facts,
    )


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            "tiny-imagenet",
            readers.tiny_imagenet,
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip, as archives or extracted",
            pixels=64,
            counts=(100_000, 10_000),
            classes=200,
            citation="Le and Yang 2015",
            licence="images of ImageNet: non-commercial research",
            note="the paper uses two tasks: --split-classes 0:100 and 100:200",
        ),
        _torchvision(
            "cifar100",
            partial(torchvision_sets.arrays, name="CIFAR100", splits=(True, False), class_names=()),
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            pixels=32,
            counts=(50_000, 10_000),
            classes=100,
            citation="Krizhevsky 2009",
            licence="none stated",
        ),
        _torchvision(
            "cifar10",
            partial(torchvision_sets.arrays, name="CIFAR10", splits=(True, False), class_names=()),
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            pixels=32,
            counts=(50_000, 10_000),
            classes=10,
            citation="Krizhevsky 2009",
            licence="none stated",
        ),
        Entry(
            "stanford-dogs",
            readers.stanford_dogs,
            "http://vision.stanford.edu/aditya86/ImageNetDogs/: images.tar and lists.tar, as archives or extracted",
            pixels=84,
            counts=(12_000, 8_580),
            classes=120,
            citation="Khosla et al. 2011",
            licence="images of ImageNet: non-commercial research",
            note="12,000 train images, against 11,999 in the paper; one of them is a PNG with transparency, kept here",
        ),
        _torchvision(
            "aircraft",
            partial(torchvision_sets.files, name="FGVCAircraft", train=["trainval"], test=["test"]),
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            pixels=84,
            counts=(6_667, 3_333),
            classes=100,
            citation="Maji et al. 2013",
            licence="non-commercial research",
            note="classes are variants; train is trainval; the banner with the photographer's name is not cropped",
        ),
        Entry(
            "cub",
            readers.cub,
            "https://www.vision.caltech.edu/datasets/cub_200_2011/: CUB_200_2011.tgz, as archives or extracted",
            pixels=84,
            counts=(5_994, 5_794),
            classes=200,
            citation="Wah et al. 2011",
            licence="non-commercial research and education",
        ),
        _torchvision(
            "svhn",
            partial(
                torchvision_sets.arrays, name="SVHN", splits=("train", "test"), class_names=torchvision_sets.DIGITS
            ),
            "http://ufldl.stanford.edu/housenumbers/",
            pixels=32,
            counts=(73_257, 26_032),
            classes=10,
            citation="Netzer et al. 2011",
            licence="non-commercial use",
            note="cropped digits, without the `extra` split",
        ),
        Entry(
            "stanford-cars",
            readers.stanford_cars,
            "cars_train.tgz, cars_test.tgz, car_devkit.tgz, cars_test_annos_withlabels.mat, as archives or extracted; "
            "the page at ai.stanford.edu is offline, https://github.com/pytorch/vision/issues/7545 lists mirrors",
            pixels=84,
            counts=(8_144, 8_041),
            classes=196,
            citation="Krause et al. 2013",
            licence="images of ImageNet: non-commercial research",
            folder="stanford_cars",
        ),
        Entry(
            "quickdraw",
            readers.quickdraw,
            "gsutil -m cp 'gs://quickdraw_dataset/full/numpy_bitmap/*.npy' RAW/quickdraw (345 files, 37 GB)",
            pixels=28,
            counts=(34_500, 34_500),
            classes=345,
            channels=1,
            citation="Ha and Eck 2017",
            licence="CC BY 4.0",
            note="100 train and 100 test drawings per class, a seeded random choice",
        ),
        _torchvision(
            "flowers",
            partial(torchvision_sets.files, name="Flowers102", train=["train", "val"], test=["test"]),
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            pixels=84,
            counts=(2_040, 6_149),
            classes=102,
            citation="Nilsback and Zisserman 2008",
            licence="none stated",
            note="train is train (1,020) followed by val (1,020)",
        ),
        _torchvision(
            "pets",
            torchvision_sets.pets,
            "https://www.robots.ox.ac.uk/~vgg/data/pets/",
            pixels=84,
            counts=(3_680, 3_669),
            classes=37,
            citation="Parkhi et al. 2012",
            licence="CC BY-SA 4.0",
            note="train is trainval",
        ),
        _torchvision(
            "stl10",
            partial(
                torchvision_sets.arrays, name="STL10", splits=("train", "test"), class_names=torchvision_sets.STL10
            ),
            "https://cs.stanford.edu/~acoates/stl10/",
            pixels=32,
            counts=(5_000, 8_000),
            classes=10,
            citation="Coates et al. 2011",
            licence="images of ImageNet: non-commercial research",
            note="96 x 96 px originally",
        ),
        _torchvision(
            "food101",
            partial(torchvision_sets.files, name="Food101", train=["train"], test=["test"]),
            "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            pixels=224,
            counts=(75_750, 25_250),
            classes=101,
            citation="Bossard et al. 2014",
            licence="scientific fair use",
        ),
        _torchvision(
            "dtd",
            partial(torchvision_sets.files, name="DTD", train=["train", "val", "test"], test=[]),
            "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
            pixels=224,
            counts=(4_230, 1_410),
            classes=47,
            test_fraction=0.25,
            citation="Cimpoi et al. 2014",
            licence="research purposes",
            note="the paper's 4,230 + 1,410 images (90 + 30 per class) match no combination of the official splits "
            "(40 + 40 + 40 per class); here fold 1 is merged and a seeded quarter of each class is the test part",
        ),
        Entry(
            "imagenet",
            readers.imagenet,
            IMAGENET,
            pixels=224,
            counts=(1_281_167, 50_000),
            classes=1_000,
            citation="Deng et al. 2009",
            licence="non-commercial research",
        ),
        *(
            Entry(
                f"imagenet-{number}",
                partial(readers.imagenet, split=number),
                IMAGENET,
                pixels=224,
                counts=counts,
                classes=classes,
                citation="Deng et al. 2009; lists of classes from WordNet 3.0",
                licence="non-commercial research",
                folder="imagenet",
                note="the paper's counts; train can differ slightly, see benchmarks/paper/imagenet_splits.py",
            )
            for number, (*counts, classes) in enumerate(IMAGENET_SPLITS, 1)
        ),
        Entry(
            "gtsrb",
            readers.gtsrb,
            "torchvision.datasets.GTSRB(ROOT, download=True)",
            pixels=32,
            counts=(26_640, 12_630),
            classes=43,
            citation="Stallkamp et al. 2011",
            licence="none stated",
        ),
        Entry(
            "fashion-mnist",
            partial(readers.idx, class_names=FASHION),
            "torchvision.datasets.FashionMNIST(ROOT, download=True), or Debian's package dataset-fashion-mnist",
            pixels=28,
            counts=(60_000, 10_000),
            classes=10,
            channels=1,
            citation="Xiao et al. 2017",
            licence="MIT",
            folder="FashionMNIST",
            download=partial(readers.download_idx, name="FashionMNIST"),
        ),
        Entry(
            "kmnist",
            partial(readers.idx, class_names=KUZUSHIJI),
            "torchvision.datasets.KMNIST(ROOT, download=True)",
            pixels=28,
            counts=(60_000, 10_000),
            classes=10,
            channels=1,
            citation="Clanuwat et al. 2018",
            licence="CC BY-SA 4.0",
            folder="KMNIST",
            download=partial(readers.download_idx, name="KMNIST"),
        ),
        Entry("image-folder", readers.image_folder, "your own images, one folder per class", pixels=64),
        Entry("table", tables.read, "your own CSV, Parquet or Arrow files, one image and label per row", pixels=64),
        Entry(
            "digits",
            readers.digits,
            "included in scikit-learn",
            pixels=8,
            counts=(1_797, 0),
            classes=10,
            channels=1,
            needs_root=False,
        ),
    )
}


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
    known = ", ".join([*CATALOG, *(EMBEDDED + task for task in embedded.TASKS)])
    raise ValueError(f"unknown dataset {name!r}; known: {known}")
