"""The samples of a map-style PyTorch dataset as batches, in a DataLoader's worker or in the training process.

A batch's bits follow from its row alone: before each sample, the global generators of Python, NumPy and torch are
seeded from the sample's position in its task's stream. They do not depend on the number of workers, on the ranks that
share the task, or on what was loaded before.
"""

import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data
from torch.utils._pytree import tree_map

from dist_cts.seeds import hashed_seed

IDLE = -1  # in place of a sample's index


class Row(NamedTuple):
    """The samples of one batch: indices into the dataset, and the positions that seed their random transforms."""

    step: int
    index: list[int]
    position: list[int]


@dataclass
class Batch:
    """What a worker returns for a row; the tensors of `inputs` and `targets` have a first dimension of len(index)."""

    inputs: Any
    targets: Tensor

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader, which would turn tuples into lists."""
        return Batch(*tree_map(Tensor.pin_memory, (self.inputs, self.targets)))


@dataclass
class Failure:
    """What a worker returns for a row with a sample that cannot be loaded."""

    sample: int
    text: str


class Samples(data.Dataset):
    """A dataset as the DataLoader reads it: the batch of a row is one item.

    Args:
        keys: what the seed of a sample depends on besides its position.
        places: two integers per worker, in which it notes the step and the sample that it is loading.
    """

    def __init__(self, dataset: data.Dataset, keys: tuple[int | str, ...], places: Any) -> None:
        self.dataset, self.keys, self.places = dataset, keys, places

    def __getitem__(self, row: Row) -> Batch | Failure:
        worker = data.get_worker_info()
        place = 2 * worker.id if worker else 0
        samples, index = [], IDLE
        with nullcontext() if worker else _generators_kept():
            try:
                for index, position in zip(row.index, row.position, strict=True):
                    self.places[place], self.places[place + 1] = row.step, index
                    _seed(hashed_seed(*self.keys, position))
                    samples.append(_to_tensors(self.dataset[index]))
                index = IDLE
                return Batch(*_stack(samples, row.index))
            except Exception as error:
                return Failure(index, _describe(error))
            finally:
                self.places[place + 1] = IDLE


def _to_tensors(sample: Any) -> tuple[Any, Tensor]:
    """A sample (inputs, target) with every array, number and list of numbers as a tensor.

    Raises:
        TypeError: it is not a pair, or holds something else.
    """
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        keys = f" with the keys {', '.join(map(str, sample))}" if isinstance(sample, dict) else ""
        raise TypeError(f"a sample must be a pair (inputs, target), found a {type(sample).__name__}{keys}")
    inputs, target = map(_to_tensor, sample)
    if not isinstance(target, Tensor):
        raise TypeError(f"a sample's target must be one tensor, array or number, found a {type(target).__name__}")
    return inputs, target


def _to_tensor(value: Any) -> Any:
    match value:
        case Tensor():
            return value
        case np.ndarray() | np.generic():
            return torch.from_numpy(np.array(value))  # a copy: it may be read-only or have negative strides
        case bool() | int() | float() | complex() | list():
            return torch.tensor(value)
        case tuple():
            return tuple(map(_to_tensor, value))
        case dict():
            return {key: _to_tensor(value[key]) for key in sorted(value)}
    raise TypeError(f"a sample must hold tensors, arrays and numbers, found a {type(value).__name__}")


def _stack(values: list[Any], index: list[int]) -> Any:
    """The samples' values as one, each tensor with a new first dimension.

    Raises:
        ValueError: they have different shapes, types or structures; names two samples that differ.
    """
    form = _form(values[0])
    for other, value in zip(index, values, strict=True):
        if _form(value) != form:
            raise ValueError(f"samples {index[0]} and {other} do not fit into one batch: {form} and {_form(value)}")
    if isinstance(values[0], Tensor):
        return data.default_collate(values)  # in a worker, into shared memory
    if isinstance(values[0], tuple):
        return tuple(_stack(list(column), index) for column in zip(*values, strict=True))
    return {key: _stack([value[key] for value in values], index) for key in values[0]}


def _form(value: Any) -> tuple:
    """What the samples of a batch have in common."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return (dict, *value) if isinstance(value, dict) else (tuple, len(value))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """A block that seeds the global generators and leaves those of the training process as they were.

    Inside, torch has one thread, as in a worker: sums over several threads would have other bits.
    """
    python, numpy, torch_state, threads = random.getstate(), np.random.get_state(), torch.get_rng_state(), None
    if torch.get_num_threads() > 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        if threads:
            torch.set_num_threads(threads)


def _describe(error: Exception) -> str:
    """Its type and text, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if frame.filename == __file__ else f" ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {one_line(error)}{where}"


def one_line(error: Exception) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())
