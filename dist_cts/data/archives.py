"""The files of a data set by their names, whether they lie in folders or in the archives that it is handed out in."""

import gzip
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dist_cts.data.raw import RawDataset, decode, from_named

Read = Callable[[], bytes]


class NotThere(ValueError):
    """The raw data of a data set are not in the folder that was named."""


@dataclass(frozen=True)
class Files:
    """Files by name; a name starts with the part of the data set, as in train/n01443537/images/n01443537_0.JPEG."""

    home: Path
    reads: dict[str, Read]

    def below(self, folder: str) -> list[str]:
        return sorted(name for name in self.reads if name.startswith(f"{folder}/"))

    def bytes(self, name: str) -> bytes:
        """Raises ValueError, naming the file, if it is missing or damaged."""
        try:
            return self.reads[name]()
        except KeyError:
            raise ValueError(f"{self.home / name}: cannot be read: there is no such file") from None
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.home / name}: cannot be read: {error}") from None

    def text(self, name: str) -> str:
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.home / name}: cannot be read: {error}") from None

    def image(self, name: str) -> Image.Image:
        return decode(io.BytesIO(self.bytes(name)), self.home / name)

    def dataset(self, class_names: list[str], labelled: list[tuple[str, int]]) -> RawDataset:
        """Images by (name, label), in this order."""
        return from_named(class_names, labelled, self.image)


def locate(root: Path, parts: dict[str, str], layout: str) -> Files:
    """The files of every part, a folder or a file, from the disk or else from the archive that `parts` names for it.

    The parts lie in the root, in one folder below it, or in a folder below that one; the root may be the archive.

    Raises:
        NotThere: a part is missing, and so is its archive; the message shows the layout.
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
    raise NotThere(f"{root}: no {first} and no {archive} in it or one folder below (expected layout: {layout})")


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
                reads |= {f"{inside}/{name}": Path(folder, name).read_bytes for name in names}
        else:
            reads[part] = path.read_bytes
    return Files(home, reads)


def _members(archive: Path) -> Iterator[tuple[str, Read]]:
    """Every file in the archive; they can be read in any order and by several threads."""
    try:
        if zipfile.is_zipfile(archive):
            file = zipfile.ZipFile(archive)
            for name in file.namelist():
                yield name, lambda name=name: file.read(name)
            return
        plain = _uncompressed(archive)
        with tarfile.open(fileobj=plain, mode="r:") as tar:
            places = [(member.name, member.size, member.offset_data) for member in tar if member.isfile()]
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: cannot be read: {error}") from None
    for name, size, offset in places:
        yield name, lambda size=size, offset=offset: os.pread(plain.fileno(), size, offset)


def _uncompressed(archive: Path) -> io.BufferedIOBase:
    """The .tar, or what a compressed one unpacks to: a file without a name, gone when the program ends."""
    with open(archive, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if not compressed:
        return open(archive, "rb")  # its members are read later
    plain = tempfile.TemporaryFile()  # noqa: SIM115 (read as long as the data set is)
    with gzip.open(archive) as packed:
        shutil.copyfileobj(packed, plain, 1 << 20)
    plain.seek(0)  # which also flushes: members are read past the buffer
    return plain
