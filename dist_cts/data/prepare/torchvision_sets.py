"""Datasets read through torchvision, which downloads them, verifies their checksums and knows their layouts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dist_cts.data.prepare.archives import NotThere
from dist_cts.data.prepare.raw import RawDataset, RawSplits, from_files, inside

DIGITS = tuple("0123456789")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def arrays(
    root: Path, name: str, splits: Sequence[str | bool], class_names: Sequence[str], download: bool
) -> RawSplits:
    """CIFAR-10, CIFAR-100, SVHN and STL10, whose images torchvision holds in memory; classes in the dataset's order."""
    argument = "train" if isinstance(splits[0], bool) else "split"
    parts = []
    for split in splits:
        data = _open(name, root, download, **{argument: split})
        pixels = data.data if data.data.shape[-1] == 3 else data.data.transpose(0, 2, 3, 1)
        labels = np.asarray(getattr(data, "labels", None) if argument == "split" else data.targets, np.int64)
        names = tuple(class_names or data.classes)
        if not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(f"{root}: {name}: labels {labels.min()}..{labels.max()}, expected 0..{len(names) - 1}")
        parts.append(RawDataset(names, labels, lambda i, pixels=pixels: np.ascontiguousarray(pixels[i])))
    return parts[0], parts[1]


def files(
    root: Path,
    name: str,
    train: Sequence[str],
    test: Sequence[str],
    download: bool,
    pairs: Callable = lambda data: [data[i] for i in range(len(data))],
    **arguments: object,
) -> RawSplits:
    """Datasets of image files; `train` and `test` name torchvision's splits, concatenated. Classes in its order.

    Without `test` no split is defined. torchvision only lists the files; they are decoded like all others.
    """
    arguments = arguments or {"loader": Path}

    def read(splits: Sequence[str]) -> RawDataset:
        opened = [_open(name, root, download, split=split, **arguments) for split in splits]
        labelled = [(inside(root.absolute(), path.absolute()), y) for data in opened for path, y in pairs(data)]
        return from_files(opened[0].classes, labelled)

    return read(train), read(test) if test else None


def pets(root: Path, download: bool) -> RawSplits:
    """Oxford-IIIT Pets; its torchvision class takes no loader, so its lists of files and labels are read directly."""
    return files(
        root,
        "OxfordIIITPet",
        ["trainval"],
        ["test"],
        download,
        lambda data: list(zip(data._images, data._labels, strict=True)),
        target_types="category",
    )


def _open(name: str, root: Path, download: bool, **arguments: object) -> object:
    from torchvision import datasets

    try:
        return getattr(datasets, name)(root, download=download, **arguments)
    except RuntimeError as error:
        raise NotThere(f"{root}: torchvision.datasets.{name}: {' '.join(str(error).split())}") from None
    except FileNotFoundError as error:
        raise NotThere(f"{root}: torchvision.datasets.{name}: no {error.filename}") from None
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{root}: torchvision.datasets.{name}: {' '.join(str(error).split())}") from None
