"""Tasks from Hugging Face datasets, by `pip install 'dist_cts[datasets]'`.

DATASETS["digits"] = HuggingFace("ylecun/mnist", inputs="image", target="label", transform=to_tensor)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class HuggingFace:
    """Opens the splits of a Hugging Face dataset; an entry of DATASETS.

    Args:
        source: a dataset on the hub, or a folder that `save_to_disk` has written.
        inputs: the column of the inputs, or several: a dict of them.
        target: the column of the target.
        transform: from the inputs to tensors; called for every sample, and may be random.
        splits: the dataset's own names of train and test.
        classes: the outputs of the head, where `target` is not a ClassLabel.
        options: further arguments of `datasets.load_dataset`, such as name and revision.
    """

    source: str
    inputs: str | Sequence[str]
    target: str
    transform: Callable[[Any], Any] | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, split: str) -> "Rows":
        """The split train or test.

        Raises:
            ImportError: datasets is not installed.
            ValueError: unknown split or column.
        """
        try:
            import datasets
        except ImportError:
            raise ImportError(
                f"{self.source}: the package datasets is not installed: pip install 'dist_cts[datasets]'"
            ) from None
        name = self.splits.get(split, split)
        if Path(self.source).is_dir():
            found = datasets.load_from_disk(self.source)
            if name not in found:
                raise ValueError(f"{self.source}: no split {name!r} among {', '.join(map(str, found))}; set `splits`")
            rows = found[name]
        else:
            rows = datasets.load_dataset(self.source, split=name, **self.options)
        inputs = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        if missing := {*inputs, self.target} - set(rows.column_names):
            raise ValueError(f"{self.source}: no column {min(missing)!r} among {', '.join(rows.column_names)}")
        return Rows(rows, self)


class Rows(Dataset):
    """One split, as pairs (inputs, target)."""

    def __init__(self, rows: Any, entry: HuggingFace) -> None:
        self.rows, self.entry = rows, entry
        self.classes = getattr(rows.features[entry.target], "num_classes", entry.classes)
        self.fingerprint = f"of {Path(entry.source).name}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row, columns = self.rows[index], self.entry.inputs
        inputs = row[columns] if isinstance(columns, str) else {column: row[column] for column in columns}
        return self.entry.transform(inputs) if self.entry.transform else inputs, row[self.entry.target]

    @property
    def targets(self) -> np.ndarray:
        """The whole column, without decoding the inputs."""
        return np.asarray(self.rows.with_format("numpy")[self.entry.target][:])
