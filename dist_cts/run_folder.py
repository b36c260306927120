"""The folder of a run: config.yaml, environment.json, and the lock that keeps a second run out."""

import fcntl
import importlib.metadata
import json
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch

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


def lock(folder: Path) -> IO[str]:
    """Takes the folder for this process, until the returned file is closed or the process ends.

    Raises:
        ValueError: another run has it.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: stop that one, or choose another run_dir") from None
    return file


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
