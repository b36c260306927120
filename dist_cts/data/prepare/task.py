"""Prepares one task: from a dataset of the catalog to its .beton files."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from dist_cts.config import Config
from dist_cts.data import beton
from dist_cts.data.manifest import AGAIN, Manifest
from dist_cts.data.prepare import raw
from dist_cts.data.prepare.catalog import EMBEDDED, Entry
from dist_cts.data.prepare.raw import RawDataset, RawSplits

RAW_UP_TO = 128  # pixels: 49 kB per raw image, against 150 kB at 224 px, or 193 GB for ImageNet


class Options(Config):
    """How to prepare a dataset."""

    split_classes: tuple[int, int] | None = None  # [first, stop), counted from 0
    pixels: int | None = Field(None, ge=1, le=1024)
    limit: int | None = Field(None, ge=1)  # train images
    test_fraction: float | None = Field(None, gt=0, lt=1)  # if the dataset has no split; None: the entry's
    seed: int = 0
    mode: Literal["raw", "jpg"] | None = None  # None: raw up to RAW_UP_TO pixels, jpg above


class OptionError(ValueError):
    """An option that is invalid for the dataset."""


def task_name(entry: Entry, root: Path | None, options: Options) -> str:
    """The default name of a task: the dataset (for your own data, the file or folder) and the class range."""
    name = entry.name.removeprefix(EMBEDDED)
    if entry.name in ("image-folder", "table") and root is not None:
        name = root.stem if root.is_file() else root.resolve().name
    return "-".join([name, *map(str, options.split_classes or ())])


def prepare(
    entry: Entry,
    root: Path | None,
    folder: Path,
    options: Options,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    log: Callable[[str], object] = print,
) -> tuple[Manifest, Manifest]:
    """Writes the task `folder` and returns its manifests; does nothing if it exists, is intact and has these options.

    Nothing is written before the raw data have been found and read.

    Raises:
        OptionError: the class range or the limit is invalid for the dataset.
        FileNotFoundError: `root` does not exist.
        ValueError: the raw data are incomplete or damaged, or the folder holds another dataset.
        ImportError: a library needed for this dataset or for mode jpg is missing.
    """
    pixels = options.pixels or entry.pixels
    options = options.model_copy(
        update={
            "test_fraction": options.test_fraction or entry.test_fraction,
            "mode": options.mode or ("raw" if (pixels or 0) <= RAW_UP_TO else "jpg"),
        }
    )
    source = _source(entry, root, options)
    done, reason = _prepared(folder, source)
    if done:
        log(reason)
        return done
    if entry.needs_root and (root is None or not root.exists()):
        raise FileNotFoundError(f"--root {root}: not found; source of the raw data: {entry.where}")
    splits = _select(entry.read(root), options)
    if reason:
        log(reason)
    if len(splits[0].class_names) == 1:
        log(f"warning: {folder}: only one class, {splits[0].class_names[0]}; classification needs at least two")
    pixels = pixels or len(np.asarray(splits[0].load(0)))
    manifests = []
    for split, data in zip(("train", "test"), splits, strict=True):
        with tqdm(total=len(data), desc=f"{folder.name} {split}", unit="image", disable=None, leave=False) as bar:
            manifests.append(
                beton.write(
                    folder / split,
                    raw.Resized(data, pixels),
                    data.labels,
                    data.class_names,
                    pixels=pixels,
                    source=source,
                    train=manifests[0] if manifests else None,
                    mode=options.mode,
                    workers=workers,
                    on_error=on_error,
                    progress=bar.update,
                )
            )
    return manifests[0], manifests[1]


def _source(entry: Entry, root: Path | None, options: Options) -> str:
    """Everything besides the raw data that determines the content of the task."""
    choices = options.model_dump() | {"pixels": options.pixels or entry.pixels}
    if entry.needs_root:
        choices["root"] = root and root.resolve()
    if entry.version:
        choices["version"] = entry.version
    return "; ".join([entry.name, *(f"{key}={value}" for key, value in choices.items() if value is not None)])


def _prepared(folder: Path, source: str) -> tuple[tuple[Manifest, Manifest] | None, str]:
    """The manifests if the task exists, is intact and has this source, else None; and what to log about it."""
    try:
        train, test = (beton.verify(folder / f"{split}.beton") for split in ("train", "test"))
    except FileNotFoundError:
        return None, ""
    except ValueError as fault:
        return None, f"{str(fault).removesuffix(f'; {AGAIN}')}; preparing the task again"
    if train.source == test.source == source and train.mean == test.mean:
        return (train, test), f"{folder}: already prepared and intact, nothing to do"
    if train.source.split(";")[0] != source.split(";")[0]:
        raise ValueError(f"{folder} holds another dataset ({train.source}); choose another --name or --out")
    return None, f"{folder}: prepared with other options ({train.source}); preparing it again"


def _select(splits: RawSplits, options: Options) -> tuple[RawDataset, RawDataset]:
    train, test = splits
    try:
        if test is None:
            train, test = raw.split(train, options.test_fraction, options.seed)
        if options.split_classes:
            train, test = (raw.select_classes(data, *options.split_classes) for data in (train, test))
        if options.limit:
            train = raw.limit(train, options.limit, options.seed)
    except ValueError as fault:
        raise OptionError(str(fault)) from None
    return train, test
