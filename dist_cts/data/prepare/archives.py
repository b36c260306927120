"""Finds the files of a dataset by name, in folders or in the archives that it is distributed as."""

import gzip
import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dist_cts.data.prepare.raw import RawDataset, decode, from_named

Read = Callable[[], bytes]
PACKED = 100  # limit of an archive's size, unpacked over packed: archives of images stay below 10
LARGEST = 1 << 30  # bytes, limit per file in an archive: a header may claim any size


class _Header(tarfile.TarInfo):
    """A tar header with a checked size; Python's own loops forever on a negative one."""

    @classmethod
    def frombuf(cls, *arguments: Any) -> "_Header":
        header = super().frombuf(*arguments)
        if not 0 <= header.size <= LARGEST:
            raise tarfile.ReadError(f"{header.name} has {header.size:,} bytes, expected 0 to {LARGEST:,}")
        return header


class NotThere(ValueError):
    """The raw data of a dataset are not in the given folder."""


@dataclass(frozen=True)
class Files:
    """Files by name; a name starts with its part of the dataset, as in train/n01443537/images/n01443537_0.JPEG."""

    home: Path
    reads: dict[str, Read]

    def below(self, folder: str) -> list[str]:
        return sorted(name for name in self.reads if name.startswith(f"{folder}/"))

    def bytes(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            ValueError: it is missing or damaged; the message names it.
        """
        try:
            return self.reads[name]()
        except KeyError:
            raise ValueError(f"{self.home / name}: cannot be read: file not found") from None
        except Exception as error:  # damaged archives raise almost anything
            raise ValueError(f"{self.home / name}: cannot be read: {error}") from None

    def text(self, name: str) -> str:
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.home / name}: cannot be read: {error}") from None

    def image(self, name: str) -> Image.Image:
        return decode(io.BytesIO(self.bytes(name)), self.home / name)

    def dataset(self, class_names: list[str], labelled: list[tuple[str, int]]) -> RawDataset:
        """The images of (name, label) pairs, in this order."""
        return from_named(class_names, labelled, self.image)


def locate(root: Path, parts: dict[str, str], layout: str) -> Files:
    """Finds every part (a folder or a file) below `root`, or else the archive that `parts` maps it to.

    Parts are searched in the root, in its subfolders, and in their subfolders; the root itself may be the archive.

    Raises:
        NotThere: a part and its archive are missing; the message shows the expected layout.
    """
    if root.is_file() and all(archive == root.name for archive in parts.values()):
        found = {part: root for part in parts}
        return _open(root.parent, found)
    folders = [root, *(sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ())]
    for deep in (False, True):
        for home in folders:
            found = {part: _place(home, (part, archive), deep) for part, archive in parts.items()}
            if all(found.values()):
                return _open(home, found)
    first, archive = next(iter(parts.items()))
    raise NotThere(f"{root}: neither {first} nor {archive} found in it or its subfolders; expected layout: {layout}")


def _place(home: Path, names: tuple[str, str], deep: bool) -> Path | None:
    folders = [home, *(sorted(path for path in home.iterdir() if path.is_dir()) if deep else ())]
    return next((folder / name for name in names for folder in folders if (folder / name).exists()), None)


def _open(home: Path, found: dict[str, Path]) -> Files:
    reads, archives = {}, {}
    for part, path in found.items():
        if path.name != part:
            if path not in archives:
                archives[path] = list(_members(path))
            for name, read in archives[path]:
                steps = [step for step in name.split("/") if step != "."]
                if part in steps:
                    reads["/".join(steps[steps.index(part) :])] = read
        elif path.is_dir():
            for folder, _, names in os.walk(path):
                inside = Path(part, Path(folder).relative_to(path)).as_posix()
                reads |= {f"{inside}/{name}": partial(_read_file, Path(folder, name)) for name in names}
        else:
            reads[part] = partial(_read_file, path)
    return Files(home, reads)


def _read_file(path: Path) -> bytes:
    if not path.is_file():  # reading a pipe would never end
        raise OSError("file not found")
    return path.read_bytes()


def _members(archive: Path) -> Iterator[tuple[str, Read]]:
    """All files in the archive, readable in any order and from several threads."""
    try:
        if zipfile.is_zipfile(archive):
            file = zipfile.ZipFile(archive)
            members = [(info.filename, info.file_size, partial(file.read, info)) for info in file.infolist()]
        else:
            plain = _uncompressed(archive)
            members, end = [], plain.seek(0, os.SEEK_END)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:", tarinfo=_Header) as tar:
                for member in tar:
                    if not 0 <= member.size <= end - member.offset_data:
                        raise tarfile.ReadError(f"{member.name} extends past the end of the archive")
                    if member.isfile():
                        read = partial(_read_at, plain, member.offset_data, member.size)
                        members.append((member.name, member.size, read))
    except Exception as error:  # damaged archives raise almost anything
        raise ValueError(f"{archive}: cannot be read: {error}") from None
    for name, size, read in members:
        if size > LARGEST:
            raise ValueError(f"{archive}: cannot be read: {name} has {size:,} bytes, at most {LARGEST:,} expected")
        yield name, read


def _read_at(file: io.BufferedIOBase, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)


def _uncompressed(archive: Path) -> io.BufferedIOBase:
    """The .tar file, or a compressed one decompressed into a temporary file that is deleted when the program exits."""
    with open(archive, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if not compressed:
        return open(archive, "rb")  # its members are read later
    plain = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the dataset)
    most = PACKED * archive.stat().st_size + (1 << 20)
    with gzip.open(archive) as packed:
        while block := packed.read(1 << 20):
            if plain.tell() + plain.write(block) > most:
                raise tarfile.ReadError(f"it unpacks to more than {PACKED} times its size")
    plain.seek(0)  # which also flushes: members are read past the buffer
    return plain
