"""The folder of a run: config.yaml, environment.json, and the lock that keeps a second run out."""

import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from dist_cts import config
from dist_cts.config import Config

PACKAGES = ("dist_cts", "torch", "torchvision", "numpy", "ffcv")


def environment(device: torch.device, world_size: int) -> dict:
    """What a result depends on besides its config: commit, versions, devices, command, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
    }


def lock(folder: Path, fresh: bool = False) -> IO[str]:
    """Takes the folder for this process, until the returned file is closed or the process ends.

    `fresh` renames a folder that holds a run to the first free one of FOLDER.1, FOLDER.2, ... and makes a new one.

    Raises:
        ValueError: another run has it; its process and host are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another run"
        raise ValueError(f"{folder} is in use by {holder}: stop it, or choose another run_dir") from None
    if fresh and (folder / "checkpoints").exists():
        numbered = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        folder.rename(next(path for path in numbered if not path.exists()))
        return lock(folder)
    file.truncate(0)
    file.write(f"another run (process {os.getpid()} on {socket.gethostname()})")
    file.flush()
    return file


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A block that writes into the folder.

    Raises:
        OSError: what went wrong in the block, with the folder and what to do.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{folder} cannot be written ({why}); once it can, the same command goes on") from error


def restarted() -> bool:
    """Whether torchrun or SLURM has restarted any rank: each counts only the failures that it has seen itself."""
    mine = any(os.environ.get(key, "0") != "0" for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    everywhere = [mine] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return any(everywhere)


def describe(folder: Path, resolved: Config, device: torch.device, world_size: int) -> None:
    """Writes config.yaml and environment.json."""
    config.save(resolved, folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps(environment(device, world_size), indent=2) + "\n")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
