"""A task on disk: a folder with train.beton, train.json, test.beton and test.json.

The .beton holds every image as pixels x pixels RGB beside its label, in FFCV's format; the .json beside it is its
manifest. FFCV reads a torn or foreign file as garbage without a word, so nothing is published before it is complete
(temporary file, fsync, rename; the manifest last), and `verify` compares the two before anyone trusts them.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, model_validator

from dist_cts.atomic import publish, remove_leftovers, replace_file, seal
from dist_cts.config import Config
from dist_cts.data.ffcv_library import import_ffcv

AGAIN = "run launch/prepare.py again"
BLOCK = 64  # images that a thread converts at a time

# FFCV's layout, version 2: a header, one descriptor per field, one record per sample, pages of image bytes, and a table
# of where each image lies.
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
RECORDS = HEADER.itemsize + 2 * FIELD.itemsize  # where they start
MODES = {"jpg": 0, "raw": 1}  # how IMAGE writes them


class Manifest(Config):
    """What one .beton file holds. Both splits of a task carry the mean and std of its train split."""

    name: str
    split: str
    count: int = Field(gt=0)
    classes: int = Field(gt=0)
    class_names: list[str]
    pixels: int = Field(gt=0, le=4096)
    channels: Literal[1, 3]  # 1: the source is grey, stored as three equal channels
    mean: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=3, max_length=3)]  # per channel
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=3, max_length=3)]
    mode: Literal["raw", "jpg"]
    source: str  # the data set and the options that it was prepared with
    skipped: tuple[str, ...] = ()  # one line for every image left out because it does not decode
    bytes: int = Field(gt=RECORDS)
    sha256: str
    format: Literal[1] = 1

    @model_validator(mode="after")
    def _names_match(self) -> "Manifest":
        if len(self.class_names) != self.classes:
            raise ValueError(f"{self.classes} classes but {len(self.class_names)} class names")
        return self


def write(
    path: str | Path,
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    pixels: int,
    source: str,
    train: Manifest | None = None,
    mode: Literal["raw", "jpg"] = "raw",
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    progress: Callable[[int], object] = lambda count: None,
) -> Manifest:
    """Writes PATH.beton and PATH.json, where `path` is FOLDER/TASK/SPLIT. The same arguments give the same bytes.

    Args:
        images: images[i] is uint8 [pixels, pixels] (grey) or [pixels, pixels, 3]. It may be slow, `workers` threads
            ask for images, and it may raise a ValueError that names the file.
        labels: int64 [N], below len(class_names).
        source: the data set and the options that made these images.
        train: for a test split, the train split's manifest, whose mean, std and channels are taken over.
        on_error: raise that ValueError, or leave the image out and record the line in `Manifest.skipped`.
        progress: called with the number of images done since the last call.

    Raises:
        ValueError: no images, a label without a class, an image of another shape or one that does not decode.
    """
    path, labels = Path(path), np.asarray(labels, dtype=np.int64)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{path}: {len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"{path}: labels {labels.min()}..{labels.max()} do not fit {len(class_names)} classes")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{path.name}.*.tmp")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        blocks = _in_threads(lambda block: _convert(images, block, pixels, on_error), len(labels), workers)
        total = _encode(temporary, blocks, labels, pixels, mode, progress)
        if not total.kept:
            raise ValueError(f"{path}: no image decodes; the first of them: {total.faults[0]}")
        mean, std = _mean_and_std(total, pixels)
        manifest = Manifest(
            name=path.parent.name,
            split=path.name,
            count=len(total.kept),
            classes=len(class_names),
            class_names=list(class_names),
            pixels=pixels,
            channels=train.channels if train else 1 if total.grey else 3,
            mean=train.mean if train else mean,
            std=train.std if train else std,
            mode=mode,
            source=source,
            skipped=tuple(total.faults),
            bytes=temporary.stat().st_size,
            sha256=_checksum(temporary),
        )
        publish(temporary, path.with_suffix(".beton"))
    finally:
        temporary.unlink(missing_ok=True)
    values = manifest.model_dump(mode="json")
    replace_file(path.with_suffix(".json"), json.dumps(values | {"seal": seal(values)}, indent=1).encode())
    return manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of `path`, which names the .beton or the .json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a complete manifest, or not as it was written.
    """
    path = Path(path).with_suffix(".json")
    try:
        values = json.loads(path.read_bytes())
        written = values.pop("seal", None) if isinstance(values, dict) else None
        manifest = Manifest.model_validate(values)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such manifest; {AGAIN}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = " ".join([".".join(map(str, fault["loc"])), fault["msg"]])
        raise ValueError(f"{path}: not a manifest: {' '.join(where.split())}; {AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest: {error}; {AGAIN}") from None
    if written not in (None, seal(values)):
        raise ValueError(f"{path}: it has changed since it was written; {AGAIN}")
    return manifest


def verify(beton: str | Path, manifest: Manifest | None = None, checksum: bool = True) -> Manifest:
    """Compares a .beton with its manifest (read from beside it if not given), which it returns.

    Without `checksum` only the header and the sample records are read, so that any size takes milliseconds.

    Raises:
        FileNotFoundError: the .beton or its manifest is missing.
        ValueError: the two do not fit; one line that names the file.
    """
    beton = Path(beton)
    if not beton.is_file():
        raise FileNotFoundError(f"{beton}: there is no such file; {AGAIN}")
    manifest = manifest or read_manifest(beton)

    def require(fits: bool, fault: str) -> None:
        if not fits:
            raise ValueError(f"{beton}: {fault}; {AGAIN}")

    size = beton.stat().st_size
    require(size == manifest.bytes, f"{size} bytes, but its manifest says {manifest.bytes}")
    with open(beton, "rb") as file:
        header, fields = np.fromfile(file, HEADER, 1), np.fromfile(file, FIELD, 2)
        names = {name.decode("ascii", "replace") for name in fields["name"]}
        require(
            names == {"image", "label"} and header["version"][0] == 2 and header["fields"][0] == 2,
            "its header is not that of FFCV's format 2 with an image and a label",
        )
        require(
            header["samples"][0] == manifest.count,
            f"{header['samples'][0]} samples, but its manifest says {manifest.count}",
        )
        require(0 < header["table"][0] < size, "its allocation table is missing: it was not written to the end")
        require(manifest.count * SAMPLE.itemsize < size, f"too short for {manifest.count} samples")
        samples = np.fromfile(file, SAMPLE, manifest.count)
        require(len(samples) == manifest.count, f"too short for {manifest.count} samples")
        labels, image = samples["label"], samples["image"]
        require(
            labels.min() >= 0 and labels.max() < manifest.classes,
            f"labels {labels.min()}..{labels.max()}, but its manifest says {manifest.classes} classes",
        )
        side, pointer = manifest.pixels, image["pointer"]
        require(
            bool(((image["width"] == side) & (image["height"] == side)).all()),
            f"images that are not {side} x {side}, as its manifest says",
        )
        stored = side * side * 3 if manifest.mode == "raw" else 1
        require(bool((image["mode"] == MODES[manifest.mode]).all()), f"images that are not {manifest.mode}")
        require(
            bool(((pointer > 0) & (pointer < size) & (pointer + np.uint64(stored) <= size)).all())
            and manifest.count * stored <= size,
            "images that lie outside the file",
        )
    if checksum:
        require(_checksum(beton) == manifest.sha256, "its checksum is not that of its manifest")
    return manifest


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Block(NamedTuple):
    """Converted images: indices kept, uint8 [n, P, P, 3], faults, and what the statistics need."""

    kept: list[int]
    images: np.ndarray
    faults: list[str]
    grey: bool
    sums: np.ndarray  # int64 [3]
    squares: np.ndarray  # int64 [3]


def _convert(images: Sequence[np.ndarray], indices: range, pixels: int, on_error: str) -> _Block:
    kept, faults, grey = [], [], True
    rgb = np.empty((len(indices), pixels, pixels, 3), np.uint8)
    for index in indices:
        try:
            image = images[index]
        except ValueError as fault:
            if on_error == "stop":
                raise
            faults.append(str(fault).encode(errors="backslashreplace").decode())  # names of files may be any bytes
            continue
        if image.dtype != np.uint8 or image.shape not in ((pixels, pixels), (pixels, pixels, 3)):
            raise ValueError(f"image {index} is {image.dtype} {list(image.shape)}, not uint8 of {pixels} pixels")
        grey &= image.ndim == 2
        rgb[len(kept)] = image if image.ndim == 3 else image[..., None]
        kept.append(index)
    rgb = rgb[: len(kept)]
    flat = rgb.reshape(-1, 3)
    sums = np.array([flat[:, channel].sum(dtype=np.int64) for channel in range(3)])
    return _Block(kept, rgb, faults, grey, sums, np.einsum("nc,nc->c", flat, flat, dtype=np.int64))


def _in_threads(convert: Callable[[range], _Block], count: int, workers: int) -> Iterator[_Block]:
    """convert(block) for the blocks of range(count), in order, with at most 2 blocks a thread in memory."""
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, BLOCK):
            waiting.append(pool.submit(convert, range(start, min(start + BLOCK, count))))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode(
    path: Path, blocks: Iterator[_Block], labels: np.ndarray, pixels: int, mode: str, progress: Callable[[int], object]
) -> _Block:
    """Writes and syncs the .beton; returns the sum of the blocks, without their images.

    The bytes are those of FFCV's own writer with one process, whose images never cross the end of a page.
    """
    encode = _jpeg_encoder() if mode == "jpg" else np.ndarray.tobytes
    page = 1 << (21 if pixels * pixels * 3 <= 1 << 16 else 23)  # the rest of a page that holds no further image is lost
    records, table = np.zeros(len(labels), SAMPLE), np.zeros(len(labels), ALLOCATION)
    end = _round_up(RECORDS + records.nbytes, page)
    kept, faults, grey, sums, squares = [], [], True, np.zeros(3, np.int64), np.zeros(3, np.int64)
    with open(path, "wb") as file:
        file.seek(end)
        for block in blocks:
            for index, image in zip(block.kept, block.images, strict=True):
                data = encode(image)
                if len(data) > page:
                    raise ValueError(f"{path}: an image of {len(data):,} bytes exceeds the page size of {page:,} bytes")
                if end % page + len(data) > page:
                    end = file.seek(_round_up(end, page))
                table[len(kept)] = (len(kept), end, len(data))
                end += file.write(data)
                kept.append(index)
            faults += block.faults
            grey, sums, squares = grey and block.grey, sums + block.sums, squares + block.squares
            progress(len(block.kept) + len(block.faults))
        count, end = len(kept), _round_up(end, page)
        image = records["image"][:count]  # records of skipped images stay zero behind the last one
        image["mode"], image["width"], image["height"] = MODES[mode], pixels, pixels
        image["pointer"], records["label"][:count] = table["pointer"][:count], labels[kept]
        file.seek(end)
        file.write(table[:count].tobytes())
        file.seek(0)
        file.write(np.array((2, 2, page, count, end), HEADER).tobytes())
        file.write(np.array([(2, b"image", b""), (1, b"label", b"")], FIELD).tobytes())
        file.write(records.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return _Block(kept, np.empty(0), faults, grey, sums, squares)


def _round_up(size: int, page: int) -> int:
    return -(-size // page) * page


def _jpeg_encoder() -> Callable[[np.ndarray], bytes]:
    """uint8 [P, P, 3] to JPEG of quality 90, FFCV's default, by FFCV's own function."""
    import_ffcv()
    from ffcv.fields.rgb_image import encode_jpeg

    return lambda image: encode_jpeg(image, 90).tobytes()


def _mean_and_std(total: _Block, pixels: int) -> tuple[list[float], list[float]]:
    """Per channel, in 0..1. A constant channel gets the std of one grey level, so that one can divide by it."""
    count = len(total.kept) * pixels * pixels
    mean = total.sums / count
    variance = np.maximum(total.squares / count - mean**2, 1.0)
    return (mean / 255).tolist(), (np.sqrt(variance) / 255).tolist()
