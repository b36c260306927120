"""The files of a checkpoint: safetensors and a manifest, synced to disk before the checkpoint is published.

    step-00001000/
        phi.safetensors          phi under its parameter names, as in an exported phi
        outer.safetensors        with method.delay: meta-updates in flight, by step; with outer.momentum: its velocity
        task-NAME.safetensors    theta and head, optimizer state and running statistics of one task
        manifest.json            step, config, and the size and checksum of every file; written last

Why not torch.distributed.checkpoint: its metadata is a pickle, which can execute code when read, and it shards tensors
over ranks. Here one rank holds all of a task's state, so one file per task can be loaded with any placement.
"""

import hashlib
import json
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from dist_cts import atomic
from dist_cts.atomic import seal
from dist_cts.config import Config

PHI = "phi.safetensors"
OUTER = "outer.safetensors"
MANIFEST = "manifest.json"
State = Mapping[str, Tensor]


class StoredFile(Config):
    """A file of a checkpoint; fingerprints of the flat vectors in it (`layout`) and of the task's training data."""

    bytes: int
    sha256: str
    layout: str
    data: str = ""


class CheckpointManifest(Config):
    """What a checkpoint holds; a folder without it is not a checkpoint."""

    step: int
    config: dict[str, Any]
    files: dict[str, StoredFile]
    format: Literal[1] = 1


def step_folder(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def task_file(task: str) -> str:
    """The name of a task's file; quoted, so that a task name cannot escape the folder."""
    return f"task-{urllib.parse.quote(task, safe='')}.safetensors"


def check_finite(name: str, state: State) -> None:
    """Raises ValueError if a tensor holds NaN or Inf; the tensor is named."""
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} not written: tensor {key!r} holds NaN or Inf")


def to_host(state: State, memory: State) -> dict[str, Tensor]:
    """Host copies, reusing tensors of `memory` with the same shape; copies from a GPU are pinned and overlap."""
    copies = {}
    for name, tensor in state.items():
        old = memory.get(name)
        fits = old is not None and old.shape == tensor.shape
        copies[name] = old if fits else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in state.values()):
        torch.cuda.synchronize()
    return copies


def write_state(path: Path, state: State, layout: str, data_fingerprint: str = "") -> StoredFile:
    """Writes named host tensors; returns their manifest entry.

    Raises:
        ValueError: a tensor holds NaN or Inf.
        OSError: the file cannot be written.
    """
    check_finite(path.name, state)
    data = safetensors.torch.save(dict(state))
    atomic.write_file(path, data)
    return StoredFile(bytes=len(data), sha256=_sha256(data), layout=layout, data=data_fingerprint)


def read_state(path: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, parsed from the same bytes whose checksum was verified.

    Raises:
        FileNotFoundError: file not found.
        ValueError: the file is truncated or corrupt, or the manifest does not list it.
    """
    if path.name not in manifest.files:
        raise ValueError(f"{path} is not listed in its manifest")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    data, expected = path.read_bytes(), manifest.files[path.name]
    if len(data) != expected.bytes:
        raise ValueError(f"{path} has {len(data)} bytes, expected {expected.bytes} from its manifest")
    if _sha256(data) != expected.sha256:
        raise ValueError(f"{path} is corrupt: its checksum does not match the manifest")
    return safetensors.torch.load(data)


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest with its own checksum."""
    values = manifest.model_dump(mode="json")
    atomic.write_file(checkpoint / MANIFEST, json.dumps(values | {"sha256": seal(values)}, indent=1).encode())


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest in a checkpoint's folder.

    Raises:
        FileNotFoundError: file not found.
        ValueError: it is truncated or corrupt, or belongs to another step.
    """
    path = checkpoint / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        valid = values.pop("sha256") == seal(values) and checkpoint.name == step_folder(values["step"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, TypeError, AttributeError, KeyError):  # not JSON, or not a manifest
        valid = False
    if not valid:
        raise ValueError(f"{path} is truncated or corrupt")
    return CheckpointManifest.model_validate(values)


def set_aside(damaged: Sequence[Path]) -> None:
    """Renames the folders of damaged checkpoints to step-S.damaged."""
    for path in damaged:
        shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
        with suppress(OSError):  # not writable: the next save reports it
            path.rename(path.with_suffix(".damaged"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
