"""The run folder: its lock, config.yaml and environment.json."""

import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch

from dist_cts import config
from dist_cts.atomic import remove_leftovers
from dist_cts.checkpoint.phi import SNAPSHOTS
from dist_cts.config import Config
from dist_cts.distributed.numerics import numerics
from dist_cts.distributed.process_group import gather
from dist_cts.errors import RunError
from dist_cts.run.console import log_rank0
from dist_cts.run.imports import ENVIRONMENT, IMPORTED
from dist_cts.run.record_file import is_at

PACKAGES = ("dist_cts", "torch", "torchvision", "numpy", "ffcv")
LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # e.g. Lustre mounted without -o flock
STOPPED = "stopped"  # marks exit code 75, which torchrun turns into 1; the batch scripts check it


class RunFolder:
    """The run folder, locked by rank 0 until it is closed; does nothing on other ranks or in a run without one."""

    def __init__(self, path: Path | None, owner: bool, fresh: bool = False) -> None:
        """Locks the folder if this rank is the `owner`; see `claim`."""
        self.path = path
        self.describe: Callable[[], object] = lambda: None  # writes the files that describe the run
        self._lock = claim(path, fresh) if owner and path is not None else None

    def restore(self) -> None:
        """Creates the folder and its description again if it was deleted or moved since the start.

        Raises:
            RunError: another run uses the folder now.
            OSError: it cannot be written.
        """
        if self._lock is None or is_at(self._lock.fileno(), self.path / LOCK):
            return
        what = f"{self.path} or its lock was deleted or moved during the run"
        try:
            lock = _claim(self.path)
        except ValueError as error:
            raise RunError(f"{what}; {error}") from None
        try:
            self.describe()
        except OSError:
            lock.close()
            raise
        self.close()
        self._lock = lock
        log_rank0(f"warning: {what}; created it again")

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            with suppress(OSError):  # the file may be gone
                self._lock.close()


def claim(folder: Path, fresh: bool = False, key: str = "run_dir") -> IO[str]:
    """Locks the run folder until the returned file is closed, and removes temporary files of killed runs.

    `fresh` renames a folder that holds a run to the first free name FOLDER.1, FOLDER.2, ... and creates a new one.
    `key`: the folder's key in the configuration, for the message.

    Raises:
        ValueError: another run holds the lock; the message names its process and host.
        OSError: the folder cannot be written.
    """
    with writing(folder):
        return _claim(folder, fresh, key)


def _claim(folder: Path, fresh: bool = False, key: str = "run_dir") -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another run"
        raise ValueError(f"{folder} is in use by {holder}: stop it, or choose another {key}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: {folder}: its file system has no file locks ({error.strerror}); "
            "do not start a second run in this folder",
            file=sys.stderr,
        )
    if not is_at(file.fileno(), folder / LOCK):  # another process moved the folder since it was opened
        file.close()
        return _claim(folder, fresh, key)
    if fresh and (folder / "checkpoints").exists():
        numbered = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        folder.rename(next(path for path in numbered if not path.exists()))
        return _claim(folder, key=key)
    file.truncate(0)
    file.write(f"another run (process {os.getpid()} on {socket.gethostname()})")
    file.flush()
    remove_leftovers(folder)
    remove_leftovers(folder / SNAPSHOTS)
    return file


@contextmanager
def writing(folder: Path | None) -> Iterator[None]:
    """A block that writes into the run folder, if there is one.

    Raises:
        OSError: with folder, cause and remedy in the message.
    """
    try:
        yield
    except OSError as error:
        why = "it is not a folder" if os.path.lexists(folder) and not folder.is_dir() else error.strerror or error
        raise OSError(f"cannot write to {folder} ({why}); fix that, then run the same command to resume") from error


def restarted() -> bool:
    """Whether torchrun or SLURM has restarted any rank; gathered, because an agent counts only failures on its node."""
    counts = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
    return any(gather(any(os.environ.get(key, "0") != "0" for key in counts)))


def describe_run(folder: Path, resolved: Config, device: torch.device, world_size: int) -> None:
    """Writes config.yaml and environment.json."""
    config.save(resolved, folder / "config.yaml")
    (folder / ENVIRONMENT).write_text(json.dumps(environment(device, world_size), indent=2) + "\n")


def environment(device: torch.device, world_size: int) -> dict:
    """Provenance of a result besides its config: commit, versions, devices, command, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "imports": IMPORTED,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "numerics": numerics(device),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # not installed, or run from a checkout


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
