"""Files that are either complete or absent: written to a temporary file, synced to disk, then renamed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and syncs it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file atomically and durably: after a crash or power loss it is the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_file(temporary, data)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Renames a synced file or folder to its final name in one step and makes the rename durable."""
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes renames and new files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, pattern: str = "*.tmp") -> None:
    """Removes temporary files that killed processes left in `folder`; the caller holds the lock on it."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def seal(values: dict[str, Any]) -> str:
    """A checksum of JSON values, to be stored beside them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
