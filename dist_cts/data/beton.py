"""Writes and verifies .beton files. A task on disk is a folder with train.beton, train.json, test.beton and test.json.

A .beton file holds every image as pixels x pixels RGB with its label, in FFCV's format; the .json file is its manifest.
FFCV decodes a truncated or foreign file to garbage without an error. Therefore files are published only when complete
(temporary file, fsync, rename; the manifest last), and `verify` compares the two before they are used.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dist_cts.atomic import publish, remove_leftovers
from dist_cts.data.ffcv_library import import_ffcv
from dist_cts.data.manifest import AGAIN, Manifest, read_manifest, write_manifest

BLOCK = 64  # images per unit of a thread's work

# FFCV's layout, version 2: a header, one descriptor per field, one record per sample, pages of image bytes, and a table
# of where each image lies.
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
RECORDS = HEADER.itemsize + 2 * FIELD.itemsize  # offset of the first record
MODES = {"jpg": 0, "raw": 1}  # their numbers in IMAGE


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
        images: images[i] is uint8 [pixels, pixels] (greyscale) or [pixels, pixels, 3]. Read by `workers` threads; may
            raise a ValueError that names the image file.
        labels: int64 [N], below len(class_names).
        source: the dataset and the options that produced these images.
        train: for a test split, the manifest of the train split, whose mean, std and channels are copied.
        mode: raw pixels, or JPEG of quality 90, which needs FFCV.
        on_error: stop: raise that ValueError; skip: leave the image out and list the message in `Manifest.skipped`.
        progress: called with the number of images processed since the last call.

    Raises:
        ValueError: no images, a label without a class, an image of another shape or one that cannot be decoded.
        OSError: the file cannot be written.
        ImportError: mode jpg without FFCV.
    """
    path, labels = Path(path), np.asarray(labels, dtype=np.int64)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{path}: {len(images)} images and {len(labels)} labels; expected equal numbers, at least 1")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"{path}: labels {labels.min()}..{labels.max()}; expected 0..{len(class_names) - 1}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{path.name}.*.tmp")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        blocks = _in_threads(lambda block: _convert(images, block, pixels, on_error), len(labels), workers)
        total = _encode(temporary, blocks, labels, pixels, mode, progress)
        if not total.kept:
            raise ValueError(f"{path}: none of the images can be decoded; the first error: {total.faults[0]}")
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
    write_manifest(path.with_suffix(".json"), manifest)
    return manifest


def verify(beton: str | Path, manifest: Manifest | None = None, checksum: bool = True) -> Manifest:
    """Compares a .beton file with its manifest (by default the one beside it) and returns the manifest.

    Without `checksum` only the header and the sample records are read, which takes milliseconds for any size.

    Raises:
        FileNotFoundError: the .beton file or its manifest does not exist.
        ValueError: they do not match; one line that names the file.
    """
    beton = Path(beton)
    if not beton.is_file():
        raise FileNotFoundError(f"{beton}: file not found; {AGAIN}")
    manifest = manifest or read_manifest(beton)

    def require(fits: bool, fault: str) -> None:
        if not fits:
            raise ValueError(f"{beton}: {fault}; {AGAIN}")

    size = beton.stat().st_size
    require(size == manifest.bytes and size > RECORDS, f"{size} bytes, expected {manifest.bytes} from its manifest")
    with open(beton, "rb") as file:
        header, fields = np.fromfile(file, HEADER, 1), np.fromfile(file, FIELD, 2)
        names = {name.decode("ascii", "replace") for name in fields["name"]}
        require(
            names == {"image", "label"} and header["version"][0] == 2 and header["fields"][0] == 2,
            "not an FFCV file of version 2 with the fields image and label",
        )
        require(
            header["samples"][0] == manifest.count,
            f"{header['samples'][0]} samples, expected {manifest.count} from its manifest",
        )
        require(0 < header["table"][0] < size, "incomplete file: the allocation table at its end is missing")
        require(manifest.count * SAMPLE.itemsize < size, f"too short for the {manifest.count} samples of its manifest")
        samples = np.fromfile(file, SAMPLE, manifest.count)
        require(len(samples) == manifest.count, f"too short for the {manifest.count} samples of its manifest")
        labels, image = samples["label"], samples["image"]
        require(
            labels.min() >= 0 and labels.max() < manifest.classes,
            f"labels {labels.min()}..{labels.max()}, expected 0..{manifest.classes - 1} from its manifest",
        )
        side, pointer = manifest.pixels, image["pointer"]
        require(
            bool(((image["width"] == side) & (image["height"] == side)).all()),
            f"some images are not {side} x {side} pixels, expected from its manifest",
        )
        stored = side * side * 3 if manifest.mode == "raw" else 1
        require(
            bool((image["mode"] == MODES[manifest.mode]).all()),
            f"some images are not stored as {manifest.mode}, expected from its manifest",
        )
        require(
            bool(((pointer > 0) & (pointer < size) & (pointer + np.uint64(stored) <= size)).all())
            and manifest.count * stored <= size,
            "some images lie outside the file",
        )
    if checksum:
        require(_checksum(beton) == manifest.sha256, "its checksum does not match its manifest")
    return manifest


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Block(NamedTuple):
    """Converted images: indices kept, uint8 [n, P, P, 3], error messages, and the sums for mean and std."""

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
            faults.append(str(fault).encode(errors="backslashreplace").decode())  # file names may hold any bytes
            continue
        if image.dtype != np.uint8 or image.shape not in ((pixels, pixels), (pixels, pixels, 3)):
            raise ValueError(
                f"image {index} is {image.dtype} {list(image.shape)}, expected uint8 [{pixels}, {pixels}] or [..., 3]"
            )
        grey &= image.ndim == 2
        rgb[len(kept)] = image if image.ndim == 3 else image[..., None]
        kept.append(index)
    rgb = rgb[: len(kept)]
    flat = rgb.reshape(-1, 3)
    sums = np.array([flat[:, channel].sum(dtype=np.int64) for channel in range(3)])
    return _Block(kept, rgb, faults, grey, sums, np.einsum("nc,nc->c", flat, flat, dtype=np.int64))


def _in_threads(convert: Callable[[range], _Block], count: int, workers: int) -> Iterator[_Block]:
    """convert(block) for the blocks of range(count), in order, with at most 2 blocks per thread in memory."""
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
    """Writes and syncs the .beton file; returns the sum of the blocks, without their images.

    Byte-identical to FFCV's own writer with one process. No image crosses a page boundary.
    """
    encode = _jpeg_encoder() if mode == "jpg" else np.ndarray.tobytes
    page = 1 << (21 if pixels * pixels * 3 <= 1 << 16 else 23)  # smaller pages waste less at their ends
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
        image = records["image"][:count]  # the records of skipped images remain, zero, behind the last one
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
    """Per channel, in 0..1. A constant channel gets the std of one grey level, to allow division by it."""
    count = len(total.kept) * pixels * pixels
    mean = total.sums / count
    variance = np.maximum(total.squares / count - mean**2, 1.0)
    return (mean / 255).tolist(), (np.sqrt(variance) / 255).tolist()
