"""The files of a checkpoint: safetensors and a manifest, on the disk before anyone relies on them.

    step-00001000/
        phi.safetensors          phi under its parameter names, as an exported phi has them
        task-NAME.safetensors    theta and head, optimizer state and running statistics of one task
        manifest.json            step, config, and the size and checksum of every file; written last

They are safetensors instead of torch.distributed.checkpoint because the latter's metadata is a pickle, which reading
would execute, and because a task's state lies whole on one rank: one file a task fits every layout as it is.
"""

import hashlib
import json
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from dist_cts.config import Config

PHI = "phi.safetensors"
MANIFEST = "manifest.json"
State = Mapping[str, Tensor]


class StoredFile(Config):
    """A file of a checkpoint; `layout` is the fingerprint of the flat vectors in it."""

    bytes: int
    sha256: str
    layout: str


class Manifest(Config):
    """What a checkpoint holds; a folder without it is no checkpoint."""

    step: int
    config: dict[str, Any]
    files: dict[str, StoredFile]
    format: Literal[1] = 1


def step_folder(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def task_file(task: str) -> str:
    """The name of a task's file; no name of a task leads out of the folder."""
    return f"task-{urllib.parse.quote(task, safe='')}.safetensors"


def check_finite(name: str, state: State) -> None:
    """Refuses tensors that would spoil every run that starts from them.

    Raises:
        ValueError: one holds NaN or an infinity; it is named.
    """
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not written: {key} is not finite")


def to_host(state: State, memory: State) -> dict[str, Tensor]:
    """Copies in host memory, that of `memory` where it fits; from a GPU pinned, all copies under way at once."""
    copies = {}
    for name, tensor in state.items():
        old = memory.get(name)
        fits = old is not None and old.shape == tensor.shape
        copies[name] = old if fits else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in state.values()):
        torch.cuda.synchronize()
    return copies


def write_state(path: Path, state: State, layout: str) -> StoredFile:
    """Writes named tensors on the host, and returns what the manifest says of them.

    Raises:
        ValueError: one is not finite.
        OSError: they cannot be written.
    """
    check_finite(path.name, state)
    data = safetensors.torch.save(dict(state))
    write_file(path, data)
    return StoredFile(bytes=len(data), sha256=_sha256(data), layout=layout)


def read_state(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, from the very bytes whose checksum is compared.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is torn or altered, or the manifest has no such file.
    """
    if path.name not in manifest.files:
        raise ValueError(f"{path} is not in its manifest")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    data, expected = path.read_bytes(), manifest.files[path.name]
    if len(data) != expected.bytes:
        raise ValueError(f"{path} has {len(data)} bytes instead of {expected.bytes}")
    if _sha256(data) != expected.sha256:
        raise ValueError(f"{path} is altered: its checksum differs")
    return safetensors.torch.load(data)


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Writes the manifest, with a checksum of its own."""
    values = manifest.model_dump(mode="json")
    write_file(checkpoint / MANIFEST, json.dumps(values | {"sha256": _seal(values)}, indent=1).encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest in a checkpoint's folder.

    Raises:
        FileNotFoundError: it has none.
        ValueError: it is torn or altered, or belongs to another step.
    """
    path = checkpoint / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        whole = values.pop("sha256") == _seal(values) and checkpoint.name == step_folder(values["step"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, TypeError, AttributeError, KeyError):  # not JSON, or not an object of ours
        whole = False
    if not whole:
        raise ValueError(f"{path} is torn or altered")
    return Manifest.model_validate(values)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file through to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Puts a file in its place in one step, which a loss of power does not halve."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_file(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes renames and new files in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(values: dict[str, Any]) -> str:
    return _sha256(json.dumps(values, sort_keys=True).encode())
