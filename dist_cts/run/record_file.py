"""Files that records are appended to: each record in full or not at all, and again after the file was deleted."""

import errno
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class RecordFile:
    """A file that is open for appending; a deleted file is created again."""

    def __init__(self, path: Path, start: bytes = b"") -> None:
        """`start`: what precedes the first record of a new file.

        Raises:
            OSError: the file cannot be written.
        """
        self.path, self._start = path, start
        self._open()

    def append(self, records: bytes) -> None:
        """Appends in full or not at all.

        Raises:
            OSError: the records could not be written, e.g. because the disk is full.
        """
        if not is_at(self._file.fileno(), self.path):
            deleted = self._file
            self._open()
            with suppress(OSError):
                deleted.close()
        end = self._file.seek(0, os.SEEK_END)
        rest = memoryview(records if end else self._start + records)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):  # part of a record would make the later ones unreadable
                self._file.truncate(end)
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _open(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self._file = self.path.open("ab", buffering=0)


class EventFile(RecordFile):
    """A file of TensorBoard scalars.

    Not torch's SummaryWriter: its thread prints a traceback when a write fails, and it never writes again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: TensorBoard hides what earlier runs in `folder` wrote from this step on."""
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        version = Event(wall_time=time.time(), step=first_step, file_version="brain.Event:2")
        session = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
        super().__init__(folder / name, _record(version) + _record(session))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Appends one point to the curve of each key.

        Raises:
            OSError: the points could not be written.
        """
        scalars = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self.append(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))))


class _Bytes(bytearray):
    write = bytearray.extend


def _record(event: Event) -> bytes:
    data = _Bytes()
    RecordWriter(data).write(event.SerializeToString())
    return bytes(data)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: neither deleted nor moved.

    Raises:
        OSError: the path cannot be reached.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: NFS, deleted by another host
            return False
        raise
