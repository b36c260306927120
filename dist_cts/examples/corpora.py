"""Fourteen small text corpora that every installation has: files of Python and of the packages that dist_cts requires.

Each one is a language-modelling task: predict every character from those before it. The selection is deterministic for
given package versions.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_cts.data.datasets import DATASETS

CHARACTERS = "\0\n" + "".join(map(chr, range(32, 127)))  # \0 stands for every other one
CONTEXT = 64  # characters that the model sees
FILE_LIMIT, LIMIT = 40_000, 200_000  # characters of a file, of a corpus
# Required by dist_cts, or by what it requires.
PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "matplotlib", "pillow", "pydantic", "safetensors"),
    *("tensorboard", "tqdm", "setuptools", "sympy", "networkx", "jinja2", "fsspec", "filelock", "joblib", "pyyaml"),
    *("contourpy", "fonttools", "kiwisolver", "packaging", "threadpoolctl", "werkzeug", "markdown", "pydantic-core"),
)


def files(package: str, *patterns: str) -> Iterator[str]:
    """The text of the files of an installed package or, for `stdlib`, of Python itself, in order of their names."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        yield path.read_text(errors="replace")


def readmes() -> Iterator[str]:
    """The long descriptions of PACKAGES, Markdown or reStructuredText."""
    for package in PACKAGES:
        _, _, text = importlib.metadata.distribution(package).read_text("METADATA").partition("\n\n")
        yield text


def licences() -> Iterator[str]:
    """The licence files of PACKAGES."""
    for package in PACKAGES:
        distribution = importlib.metadata.distribution(package)
        paths = (path for path in distribution.files or () if "licen" in path.name.lower() and ".py" not in path.name)
        for path in sorted(paths):
            yield path.locate().read_text(errors="replace")


def docstrings() -> Iterator[str]:
    """The documentation of NumPy's and SciPy's functions, a text per module."""
    for package, pattern in (("numpy", "lib/*.py"), ("scipy", "stats/_[a-d]*.py"), ("scipy", "optimize/_[l-m]*.py")):
        for text in files(package, pattern):
            nodes = ast.walk(ast.parse(text))
            parts = (ast.get_docstring(node) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))
            yield "\n\n".join(part for part in parts if part)


CORPORA: dict[str, Callable[[], Iterator[str]]] = {
    "python": partial(files, "stdlib", "*.py"),
    "headers": partial(files, "torch", "include/c10/**/*.h"),
    "stubs": partial(files, "numpy", "**/*.pyi"),
    "licences": licences,
    "readmes": readmes,
    "docstrings": docstrings,
    "yaml": partial(files, "torchgen", "packaged/**/*.yaml"),
    "fonts": partial(files, "matplotlib", "mpl-data/fonts/afm/*.afm"),
    # Not in the configuration's meta-training.
    "tables": partial(files, "sklearn", "datasets/data/*.csv"),
    "drawings": partial(files, "matplotlib", "mpl-data/images/*.svg"),
    "cython": partial(files, "sklearn", "**/*.pyx", "**/*.pxd"),
    "cmake": partial(files, "torch", "share/cmake/**/*.cmake"),
    "json": partial(files, "torch", "_dynamo/*.json"),
    "web": partial(files, "matplotlib", "backends/web_backend/**/*.js", "backends/web_backend/**/*.css"),
}


@cache
def encoded(corpus: str) -> tuple[np.ndarray, np.ndarray]:
    """The characters of a corpus as numbers below len(CHARACTERS), uint8: train, and test, the last tenth of each file.

    Raises:
        ValueError: the files are missing here.
    """
    table = np.zeros(256, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    train, test, size = [], [], 0
    for text in CORPORA[corpus]():
        text = text.replace("\t", "    ")[: min(FILE_LIMIT, LIMIT - size)]
        size += len(text)
        codes = table[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]
        train.append(codes[: len(codes) * 9 // 10])
        test.append(codes[len(codes) * 9 // 10 :])
        if size == LIMIT:
            break
    if size < 50 * CONTEXT:
        raise ValueError(f"corpus {corpus}: only {size} characters are installed here")
    return np.concatenate(train), np.concatenate(test)


class Characters(Dataset):
    """Windows of a corpus: CONTEXT characters, int64 [L], and for each the one that follows it.

    A train window starts at a random place within CONTEXT characters.
    """

    classes = len(CHARACTERS)

    def __init__(self, corpus: str, split: str) -> None:
        self.text, self.random = encoded(corpus)[split == "test"], split == "train"
        self.fingerprint = hashlib.sha256(self.text).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.text) // CONTEXT - 1 - self.random

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * CONTEXT + (int(torch.randint(CONTEXT, ())) if self.random else 0)
        window = torch.from_numpy(self.text[start : start + CONTEXT + 1].astype(np.int64))
        return window[:-1], window[1:]


for name in CORPORA:
    DATASETS[name] = partial(Characters, name)
