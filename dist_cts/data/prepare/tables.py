"""Reads tables of images: CSV, Parquet and Arrow files, and datasets saved by Hugging Face `datasets`."""

import csv
import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dist_cts.data.prepare.archives import NotThere
from dist_cts.data.prepare.raw import RawDataset, RawSplits, decode, from_named, inside, open_image

SUFFIXES = (".csv", ".parquet", ".arrow")
IMAGE = ("image", "img", "path", "file_name")
LABEL = ("label", "labels", "fine_label")


def read(root: Path) -> RawSplits:
    """Reads one table, or a folder with tables; names starting with train and test (or val) define the two splits.

    A row holds an image (column image, img, path or file_name: a path inside the table's folder, the bytes of an image
    file, or Hugging Face's {bytes, path}) and a label (column label, labels or fine_label). Class names are those that
    the file declares (Hugging Face's ClassLabel), or else the sorted labels of both splits, numbers by value.

    Raises:
        NotThere: no table found.
        ValueError: a table is damaged or incomplete; the message names it.
        ImportError: Parquet or Arrow files without pyarrow.
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
        raise NotThere(f"{root}: no .csv, .parquet or .arrow files found")
    splits = [[_table(path) for path in paths] for paths in parts]
    declared = [names for tables in splits for _, _, names in tables if names]
    values = {label for tables in splits for _, labels, _ in tables for label in labels}
    if declared:
        names, label_of = declared[0], {value: value for value in range(len(declared[0]))}
        if any(other != names for other in declared) or not values <= label_of.keys():
            raise ValueError(f"{root}: the tables declare different classes, or labels outside {len(names)} classes")
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
    """A function that loads the image of row i, the labels of all rows, and the declared class names."""
    if path.suffix == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        image, label = _columns(path, [name for name in (rows[0] if rows else ()) if name])
        for number, row in enumerate(rows, 2):
            if None in row:
                raise ValueError(f"{path}: line {number} has more cells than the header; quote values with commas")
            if not row[image] or not row[label]:
                raise ValueError(f"{path}: line {number}: {image} or {label} is empty")
        return lambda i: _open(path, i, rows[i][image]), [row[label] for row in rows], []
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{path}: reading it needs pyarrow: pip install 'dist_cts[parquet]'") from None
    try:
        if path.suffix == ".parquet":
            file = parquet.ParquetFile(path)
            schema = file.schema_arrow
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            image, label = _columns(path, schema.names)
            labels = parquet.read_table(path, columns=[label]).column(label).to_pylist()
        else:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
            table.validate(full=True)  # Arrow does not check the offsets in a file by default
            schema, groups = table.schema, [len(table)]
            image, label = _columns(path, schema.names)
            labels = table.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    wrong = (row for row, value in enumerate(labels) if not isinstance(value, str | int))
    if (row := next(wrong, None)) is not None:
        raise ValueError(f"{path}: row {row}: {label} is {labels[row]!r}, expected a string or an integer")

    @functools.lru_cache(maxsize=4)  # rows are read in order, by several threads
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
            raise ValueError(f"{path}: row {row}: {image} is empty")
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
    """The class names of Hugging Face's ClassLabel, if declared."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the class names of {label} are {names!r}, expected a list of strings")
    return names


def _columns(path: Path, names: list[str]) -> tuple[str, str]:
    image, label = (next((name for name in known if name in names), None) for known in (IMAGE, LABEL))
    if image is None or label is None:
        raise ValueError(
            f"{path}: columns {', '.join(names) or 'none'}; expected one of {', '.join(IMAGE)} and one of "
            f"{', '.join(LABEL)}"
        )
    return image, label
