"""Raw pixels or JPEG inside a .beton: file size, write speed and read speed by image size.

    python benchmarks/storage.py [--root RAW/tiny-imagenet-200] [--workers 1 2] [--quick]

Without --root (default: tiny-imagenet-200 below $DIST_CTS_DATA, if it is there) only crops of scikit-learn's two
photographs are measured: few, but with full detail at every size. TinyImageNet has thousands of scenes, but of 64 px:
larger sizes are upscaled, which compresses better than a photograph, or combined in mosaics, which compress worse.
Reads come from the page cache: if the data does not fit into memory, the smaller file has an advantage.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.report import alternate, parser, publish, ratio, shown, spread
from dist_cts.data import beton
from dist_cts.data.manifest import Manifest
from dist_cts.data.prepare import readers
from dist_cts.data.prepare.raw import RawDataset, Resized
from dist_cts.data.source import ResidentSource, StreamingSource

CPU = torch.device("cpu")
MODES = ("raw", "jpg")
BATCH = 128
PASSES = {"raw": 64, "jpg": 4}  # epochs per timing of streaming
COUNT, BYTES, QUICK_BYTES = 2048, 64 << 20, 2 << 20  # images per case, and their maximum raw size


@dataclass(frozen=True)
class Case:
    """Images to store: description, images, and the side that they are resized to."""

    what: str
    raw: RawDataset
    pixels: int


def cases(root: Path | None, quick: bool) -> Iterator[Case]:
    """COUNT images per case, or as many as fit in BYTES (QUICK_BYTES) when raw."""
    sizes = (64,) if quick else (28, 32, 64, 84, 128, 224)
    kinds = [("photographs", crops(COUNT), pixels) for pixels in sizes]
    if root is not None:
        train, _ = readers.tiny_imagenet(root)
        tiny = train.take(np.random.default_rng(0).permutation(len(train)))
        kinds += [("TinyImageNet" + ", scaled up" * (pixels > 64), tiny, pixels) for pixels in sizes]
        kinds.append(("TinyImageNet, mosaics", mosaics(tiny), 224))
    for what, raw, pixels in kinds:
        count = min((QUICK_BYTES if quick else BYTES) // (3 * pixels**2), COUNT, len(raw))
        yield Case(what, raw.take(np.arange(count)), pixels)


def crops(count: int) -> RawDataset:
    """`count` random squares, 224 to 427 px, of the two photographs (640 x 427) that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images

    def load(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        side = rng.integers(224, 428)
        top, left = rng.integers(0, 428 - side), rng.integers(0, 641 - side)
        return photographs[index % 2][top : top + side, left : left + side]

    return RawDataset(("china", "flower"), np.arange(count) % 2, load)


def mosaics(raw: RawDataset) -> RawDataset:
    """4 x 4 of the 64 px images in one: for each image, it and those that follow it."""

    def load(index: int) -> Image.Image:
        picture = Image.new("RGB", (256, 256))
        for place in range(16):
            picture.paste(raw.load((index + place) % len(raw)), (64 * (place % 4), 64 * (place // 4)))
        return picture

    return RawDataset(raw.class_names, raw.labels, load)


def measure(case: Case, folder: Path, workers: Sequence[int], rounds: int) -> dict:
    """Bytes per image, PSNR of JPEG, and images per second; speeds as `spread`s, by "mode threads"."""
    count, order = len(case.raw), np.random.default_rng(0)
    paths, manifests, resident = {mode: folder / mode / "train.beton" for mode in MODES}, {}, {}

    def rows() -> list[np.ndarray]:
        return np.split(order.permutation(count), range(BATCH, count, BATCH))

    def write(mode: str, threads: int) -> None:
        manifests[mode] = beton.write(
            paths[mode].with_suffix(""),
            Resized(case.raw, case.pixels),
            case.raw.labels,
            case.raw.class_names,
            pixels=case.pixels,
            source=case.what,
            mode=mode,
            workers=threads,
        )

    def stream(mode: str, threads: int) -> None:
        wanted = [row for _ in range(PASSES[mode]) for row in rows()]
        prefetch = sources[mode, threads].prefetch(iter(wanted), BATCH)
        for _ in wanted:
            prefetch.take()
        prefetch.close()

    def open_resident(mode: str) -> None:
        resident[mode] = ResidentSource(paths[mode], manifests[mode], CPU)

    def gather(mode: str) -> None:
        for row in rows():
            resident[mode].take(torch.from_numpy(row))

    both = list(product(MODES, workers))
    written = rates(write, both, count, rounds, warm_up=0)
    sources = {(mode, n): StreamingSource(paths[mode], manifests[mode], CPU, n) for mode, n in both}
    streamed = rates(stream, both, count, rounds)
    for mode, n in both:
        streamed[f"{mode} {n}"] = [PASSES[mode] * rate for rate in streamed[f"{mode} {n}"]]
    opened = rates(open_resident, list(product(MODES)), count, rounds, warm_up=0)  # FFCV compiles at every start
    gathered = rates(gather, list(product(MODES)), count, rounds)
    return {
        "images": case.what,
        "pixels": case.pixels,
        "count": count,
        "bytes_an_image": {mode: bytes_an_image(path, manifests[mode]) for mode, path in paths.items()},
        "jpg_psnr_db": psnr(resident["raw"].images, resident["jpg"].images),
        "written": _spreads(written),
        "streamed": _spreads(streamed),
        "streamed_raw_to_jpg": {str(n): ratio(streamed[f"raw {n}"], streamed[f"jpg {n}"]) for n in workers},
        "made_resident": _spreads(opened),
        "resident": _spreads(gathered),
    }


def rates(
    function: Callable, competitors: Sequence[tuple], count: int, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """`count` images divided by the seconds of function(*competitor), in every round, by competitor."""
    calls = {" ".join(map(str, competitor)): partial(function, *competitor) for competitor in competitors}
    return {name: [count / s for s in seconds] for name, seconds in alternate(calls, rounds, warm_up).items()}


def bytes_an_image(path: Path, manifest: Manifest) -> float:
    """Bytes of one more image, so that the incomplete pages of a file do not count."""
    table = int(np.fromfile(path, beton.HEADER, 1)["table"][0])
    allocated = np.fromfile(path, "<u8", offset=table).reshape(-1, 3)
    _, pointers, sizes = allocated.T
    return float((pointers + sizes).max() - pointers.min() + allocated.nbytes) / manifest.count + beton.SAMPLE.itemsize


def psnr(images: torch.Tensor, stored: torch.Tensor) -> float:
    """Decibels; the peak is 255."""
    error = np.mean([(a.float() - b.float()).square().mean().item() for a, b in zip(images, stored, strict=True)])
    return float(20 * np.log10(255) - 10 * np.log10(error))


def row(result: dict, workers: Sequence[int]) -> dict:
    """Table row of a case, with median speeds."""

    def pair(name: str, threads: str = "") -> str:
        return " / ".join(f"{result[name][mode + threads]['median']:,.0f}" for mode in MODES)

    raw, jpg = (result["bytes_an_image"][mode] for mode in MODES)
    return {
        "raw / jpg": result["images"],
        "px": result["pixels"],
        "bytes an image": f"{raw:,.0f} / {jpg:,.0f}",
        "size": f"{raw / jpg:.1f}",
        "PSNR": f"{result['jpg_psnr_db']:.0f} dB",
        **{f"written/s, {n} thr.": pair("written", f" {n}") for n in workers},
        **{f"streamed/s, {n} thr.": pair("streamed", f" {n}") for n in workers},
        "speed": shown(result["streamed_raw_to_jpg"][str(workers[0])], 2),
        "made resident/s": pair("made_resident"),
        "resident/s": f"{result['resident']['raw']['median']:,.0f}",
    }


def _spreads(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: spread(each) for name, each in values.items()}


def main(arguments: list[str] | None = None) -> None:
    usage = parser(__doc__)
    known = Path(os.environ.get("DIST_CTS_DATA", "")) / "tiny-imagenet-200"
    usage.add_argument("--root", type=Path, default=known if known.is_dir() else None, help="TinyImageNet")
    usage.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of threads (default 1 2)")
    usage.add_argument("--rounds", type=int, default=5)
    args = usage.parse_args(arguments)
    results = []
    for case in cases(args.root, args.quick):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(case, Path(folder), args.workers, 1 if args.quick else args.rounds))
        print(f"{case.what}, {case.pixels} px, {len(case.raw):,} images: measured", flush=True)
    publish("storage", {"cases": results}, [row(result, args.workers) for result in results], args)


if __name__ == "__main__":
    main()
