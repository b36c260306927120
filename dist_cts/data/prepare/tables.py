"""Tables of images: CSV of path and label, Parquet of the same, and what Hugging Face `datasets` writes."""

import csv
import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dist_cts.data.prepare.archives import NotThere
from dist_cts.data.prepare.raw import RawDataset, decode, from_named, inside, open_image
from dist_cts.data.prepare.readers import Split

SUFFIXES = (".csv", ".parquet", ".arrow")
IMAGE = ("image", "img", "path", "file_name")
LABEL = ("label", "labels", "fine_label")


def read(root: Path) -> Split:
    """A table, or a folder with tables: `train*`, or the folder `train`, and `test*`, or `val*`, are its two splits.

    A row has an image (column image, img, path or file_name: a path, relative or absolute, that leads into the table's
    folder, or the bytes of an image file, or Hugging Face's {bytes, path}) and a label (label, labels or fine_label).
    Classes are the names that the file declares (Hugging Face's ClassLabel), else the sorted labels of both splits,
    numbers by value.
    """
    if root.is_file():
        parts = [[root], []]
    else:
        paths = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.name[0] not in "._")
        named = {
            name: [path for path in paths if path.relative_to(root).as_posix().removeprefix("data/").startswith(name)]
            for name in ("train", "test", "val")
        }
        parts = [named["train"] or paths, (named["test"] or named["val"]) if named["train"] else []]
    if not parts[0]:
        raise NotThere(f"{root}: no .csv, .parquet or .arrow in it or below")
    splits = [[_table(path) for path in paths] for paths in parts]
    declared = [names for tables in splits for _, _, names in tables if names]
    values = {label for tables in splits for _, labels, _ in tables for label in labels}
    if declared:
        names, label_of = declared[0], {value: value for value in range(len(declared[0]))}
        if any(other != names for other in declared) or not values <= label_of.keys():
            raise ValueError(f"{root}: its files do not agree on their {len(names)} classes")
    else:
        names = sorted({str(value) for value in values}, key=_by_value)
        place = {name: label for label, name in enumerate(names)}
        label_of = {value: place[str(value)] for value in values}

    def dataset(tables: list) -> RawDataset:
        return from_named(
            names,
            [((load, row), label_of[label]) for load, labels, _ in tables for row, label in enumerate(labels)],
            lambda named: named[0](named[1]),
        )

    return dataset(splits[0]), dataset(splits[1]) if splits[1] else None


def _by_value(text: str) -> tuple:
    return (0, int(text), text) if re.fullmatch(r"-?\d{1,18}", text) else (1, 0, text)


def _table(path: Path) -> tuple[Callable, list, list[str]]:
    """How to load row i, the labels of all rows, and the class names that the file declares."""
    if path.suffix == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        image, label = _columns(path, [name for name in (rows[0] if rows else ()) if name])
        for number, row in enumerate(rows, 2):
            if None in row:
                raise ValueError(f"{path}: line {number} has more cells than line 1: quote what holds a comma")
            if not row[image] or not row[label]:
                raise ValueError(f"{path}: line {number} lacks a {image} or a {label}")
        return lambda i: _open(path, i, rows[i][image]), [row[label] for row in rows], []
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{path}: reading it takes pyarrow: pip install 'dist_cts[parquet]'") from None
    try:
        if path.suffix == ".parquet":
            file = parquet.ParquetFile(path)
            schema, groups = (
                file.schema_arrow,
                [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
            )
            image, label = _columns(path, schema.names)
            labels = parquet.read_table(path, columns=[label]).column(label).to_pylist()
        else:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
            table.validate(full=True)  # Arrow itself trusts the offsets in a file
            schema, groups = table.schema, [len(table)]
            image, label = _columns(path, schema.names)
            labels = table.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    wrong = (row for row, value in enumerate(labels) if not isinstance(value, str | int))
    if (row := next(wrong, None)) is not None:
        raise ValueError(f"{path}: row {row} has no {label} that is a text or a whole number: {labels[row]!r}")

    @functools.lru_cache(maxsize=4)  # rows are asked for in order, by several threads
    def column(group: int) -> object:
        if path.suffix == ".arrow":
            return table.column(image)
        return parquet.ParquetFile(path).read_row_group(group, columns=[image]).column(image)

    def load(row: int) -> object:
        place, group = row, 0
        while place >= groups[group]:
            place, group = place - groups[group], group + 1
        try:
            value = column(group)[place].as_py()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: row {row} cannot be read: {' '.join(str(error).split())}") from None
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return _open(path, row, value)
        if not isinstance(value, bytes):
            raise ValueError(f"{path}: row {row} has no {image}")
        return decode(io.BytesIO(value), f"{path}: row {row}")

    try:
        return load, labels, _class_names(schema.metadata or {}, label)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: its features: {error}") from None


def _open(table: Path, row: int, name: str) -> Image.Image:
    try:
        return open_image(inside(table.parent, name))
    except (ValueError, OSError) as fault:
        raise ValueError(f"{table}: row {row}: {fault}") from None


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """What Hugging Face's ClassLabel declares, if it does."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of {label} are {names!r}")
    return names


def _columns(path: Path, names: list[str]) -> tuple[str, str]:
    image, label = (next((name for name in known if name in names), None) for known in (IMAGE, LABEL))
    if image is None or label is None:
        raise ValueError(
            f"{path}: its columns are {', '.join(names) or 'none'}; one of {', '.join(IMAGE)} and one of "
            f"{', '.join(LABEL)} are needed"
        )
    return image, label
