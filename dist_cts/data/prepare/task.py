"""Preparation: from a data set of the catalog to the .beton files of one task."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from dist_cts.config import Config
from dist_cts.data import beton
from dist_cts.data.manifest import Manifest
from dist_cts.data.prepare import raw
from dist_cts.data.prepare.catalog import EMBEDDED, Entry
from dist_cts.data.prepare.raw import RawDataset
from dist_cts.data.prepare.readers import Split

RAW_UP_TO = 128  # a raw image has 49 kB then, and 150 kB at 224 px: 193 GB for ImageNet


class Options(Config):
    """What to make of a data set."""

    split_classes: tuple[int, int] | None = None  # first (from 0) and stop, as in a Python slice
    pixels: int | None = Field(None, ge=1, le=1024)
    limit: int | None = Field(None, ge=1)  # train images
    test_fraction: float | None = Field(None, gt=0, lt=1)  # where the data set has no split; None: its entry's
    seed: int = 0
    mode: Literal["raw", "jpg"] | None = None  # None: raw up to RAW_UP_TO pixels, jpg above


class OptionError(ValueError):
    """An option that does not fit the data set."""


def task_name(entry: Entry, root: Path | None, options: Options) -> str:
    """The folder of a task that was given no name: the data set (for your own, the file or folder) and class range."""
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
    """Writes the task `folder` and returns its manifests; does nothing if it is there, intact and of these options.

    Raises:
        OptionError: the class range or the limit does not fit the data set.
        FileNotFoundError: there is no folder `root`.
        ValueError: the raw data are not what they should be, or the folder holds another data set.
    """
    pixels = options.pixels or entry.pixels
    options = options.model_copy(
        update={
            "test_fraction": options.test_fraction or entry.test_fraction,
            "mode": options.mode or ("raw" if (pixels or 0) <= RAW_UP_TO else "jpg"),
        }
    )
    source = _source(entry, root, options)
    done = _prepared(folder, source, log)
    if done:
        return done
    if entry.needs_root and (root is None or not root.exists()):
        raise FileNotFoundError(f"{root}: there is no such folder; where to get the data: {entry.where}")
    splits = _select(entry.read(root), options)
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
    """All that decides the task's bytes but the raw data themselves."""
    choices = options.model_dump() | {"pixels": options.pixels or entry.pixels}
    if entry.needs_root:
        choices["root"] = root and root.resolve()
    if entry.version:
        choices["version"] = entry.version
    return "; ".join([entry.name, *(f"{key}={value}" for key, value in choices.items() if value is not None)])


def _prepared(folder: Path, source: str, log: Callable[[str], object]) -> tuple[Manifest, Manifest] | None:
    """The manifests of a task that is there, intact and made from this source."""
    try:
        train, test = (beton.verify(folder / f"{split}.beton") for split in ("train", "test"))
    except FileNotFoundError:
        return None
    except ValueError as fault:
        log(f"{str(fault).removesuffix(f'; {beton.AGAIN}')}: preparing it again")
        return None
    if train.source == test.source == source and train.mean == test.mean:
        log(f"{folder}: already there and intact, nothing to do")
        return train, test
    if train.source.split(";")[0] != source.split(";")[0]:
        raise ValueError(f"{folder} holds another data set ({train.source}); choose another --name or --out")
    log(f"{folder}: there with other options ({train.source}), preparing it again")
    return None


def _select(splits: Split, options: Options) -> tuple[RawDataset, RawDataset]:
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
