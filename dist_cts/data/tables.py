"""Tables of images: CSV of path and label, Parquet of the same, and what Hugging Face `datasets` writes."""

import csv
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

from dist_cts.data.archives import NotThere
from dist_cts.data.raw import RawDataset, decode, from_named, open_image
from dist_cts.data.readers import Split

SUFFIXES = (".csv", ".parquet", ".arrow")
IMAGE = ("image", "img", "path", "file_name")
LABEL = ("label", "labels", "fine_label")


def read(root: Path) -> Split:
    """A table, or a folder with tables: `train*`, or the folder `train`, and `test*`, or `val*`, are its two splits.

    A row has an image (column image, img, path or file_name: a path, relative to the table's folder or absolute, or
    the bytes of an image file, or Hugging Face's {bytes, path}) and a label (label, labels or fine_label). Classes are
    the names that the file declares (Hugging Face's ClassLabel), else the sorted labels of both splits, numbers by
    value.
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
        ordered = sorted(values, key=_by_value)
        names, label_of = [str(value) for value in ordered], {value: i for i, value in enumerate(ordered)}

    def dataset(tables: list) -> RawDataset:
        return from_named(
            names,
            [((load, row), label_of[label]) for load, labels, _ in tables for row, label in enumerate(labels)],
            lambda named: named[0](named[1]),
        )

    return dataset(splits[0]), dataset(splits[1]) if splits[1] else None


def _by_value(label: str | int) -> tuple:
    text = str(label)
    return (0, int(text), text) if text.lstrip("-").isdecimal() else (1, 0, text)


def _table(path: Path) -> tuple[Callable, list, list[str]]:
    """How to load row i, the labels of all rows, and the class names that the file declares."""
    if path.suffix == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        image, label = _columns(path, rows[0].keys() if rows else ())
        for number, row in enumerate(rows, 2):
            if not row[image] or not row[label]:
                raise ValueError(f"{path}: line {number} lacks a {image} or a {label}")
        return lambda i: open_image(path.parent / rows[i][image]), [row[label] for row in rows], []
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
            schema, groups = table.schema, [len(table)]
            image, label = _columns(path, schema.names)
            labels = table.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if None in labels:
        raise ValueError(f"{path}: row {labels.index(None)} has no {label}")

    @functools.lru_cache(maxsize=4)  # rows are asked for in order, by several threads
    def column(group: int) -> object:
        if path.suffix == ".arrow":
            return table.column(image)
        return parquet.ParquetFile(path).read_row_group(group, columns=[image]).column(image)

    def load(row: int) -> object:
        inside, group = row, 0
        while inside >= groups[group]:
            inside, group = inside - groups[group], group + 1
        value = column(group)[inside].as_py()
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        if isinstance(value, str):
            return open_image(path.parent / value)
        return decode(io.BytesIO(value or b""), f"{path}: row {row}")

    return load, labels, _class_names(schema.metadata or {}, label)


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get(label, {}).get("names") or []


def _columns(path: Path, names: list[str]) -> tuple[str, str]:
    image, label = (next((name for name in known if name in names), None) for known in (IMAGE, LABEL))
    if image is None or label is None:
        raise ValueError(
            f"{path}: its columns are {', '.join(names) or 'none'}; one of {', '.join(IMAGE)} and one of "
            f"{', '.join(LABEL)} are needed"
        )
    return image, label
