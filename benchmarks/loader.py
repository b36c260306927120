"""Throughput of loaders on one task: FFCV, our streamed and resident sources, torchvision; see --help."""

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from benchmarks import learners, report
from dist_cts.data import augment, beton
from dist_cts.data.batches import DataConfig, TaskBatches, open_task
from dist_cts.data.ffcv_library import import_ffcv
from dist_cts.data.plan import default_padding
from dist_cts.data.prepare import embedded

EPILOG = """\
stages, both on the device:
  decoded    uint8 images, as stored
  augmented  random crop, flip and normalisation: the input of a model
loaders, each with --workers threads (torchvision: processes), shuffling, taking turns:
  ffcv         ffcv.loader.Loader; its own flip and translation if augmented
  streamed     ours, decoded by FFCV and augmented on the device
  resident     ours, gathered from device memory and augmented there
  torchvision  ImageFolder of the same images as PNG, and DataLoader
The first two need FFCV. Ratios are to the first of the measured loaders. The first batch is timed in a separate
process, starting before the file is opened and FFCV imported. CPU time includes all threads and workers of one rank.

  python benchmarks/loader.py --data data/tasks/tiny-imagenet-0-100
"""
LOADERS, STAGES = ("ffcv", "streamed", "resident", "torchvision"), ("decoded", "augmented")
COPIES = 16  # copies of the embedded images, so that an epoch of FFCV is long enough


def open_loader(
    task: Path, loader: str, stage: str, batch_size: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Endless batches; decoded ones are uint8 [B, P, P, 3] (torchvision: [B, 3, P, P])."""
    if loader == "ffcv":
        return bare_ffcv(task, stage, batch_size, workers, device)
    if loader == "torchvision":
        return torchvision_folder(task, stage, batch_size, workers, device)
    config = DataConfig(cache={"streamed": "stream", "resident": "device"}[loader], workers=workers, verify=False)
    batches = TaskBatches(open_task(task, "train", config, device), 0, batch_size, config)
    if stage == "augmented":
        return augmented(batches)
    return decoded(batches, batch_size)


def augmented(batches: TaskBatches) -> Iterator[Tensor]:
    """The batches that a learner consumes."""
    with closing(batches):
        while True:
            yield batches.next()[0]


def decoded(batches: TaskBatches, batch_size: int) -> Iterator[Tensor]:
    """The plan's images as the source returns them."""

    def rows() -> Iterator[np.ndarray]:
        for start in itertools.count(0, 256):
            yield from batches.plan.chunk(start, 256).index

    with closing(batches.source.prefetch(rows(), batch_size)) as prefetch:
        for row in rows():
            yield prefetch.take(torch.from_numpy(row).to(batches.source.device))


def bare_ffcv(task: Path, stage: str, batch_size: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    import_ffcv()
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate

    pixels = beton.read_manifest(task / "train.beton").pixels
    transforms = [RandomHorizontalFlip(), RandomTranslate(default_padding(pixels))] if stage == "augmented" else []
    loader = Loader(
        str(task / "train.beton"),
        batch_size,
        workers,
        order=OrderOption.RANDOM,
        pipelines={"image": [SimpleRGBImageDecoder(), *transforms], "label": None},
    )
    half = torch.full((3,), 0.5, device=device)
    for (images,) in itertools.chain.from_iterable(itertools.repeat(loader)):
        batch = torch.from_numpy(images).to(device)
        yield augment.normalise(batch, half, half) if stage == "augmented" else batch


def torchvision_folder(task: Path, stage: str, batch_size: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    pixels = beton.read_manifest(task / "train.beton").pixels
    if stage == "augmented":
        crop = transforms.RandomCrop(pixels, default_padding(pixels))
        half = (0.5, 0.5, 0.5)
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(half, half)]
    else:
        steps = [transforms.PILToTensor()]
    images = ImageFolder(task / "png", transforms.Compose(steps))
    endless = RandomSampler(images, replacement=True, num_samples=10**9)
    loader = DataLoader(images, batch_size, sampler=endless, num_workers=workers, pin_memory=device.type == "cuda")
    for batch, _ in loader:
        yield batch.to(device, non_blocking=True)


def write_png(task: Path, limit: int = 2000) -> None:
    """A subset of the task's images, read by torchvision's ImageFolder."""
    source = open_task(task, "train", DataConfig(cache="device", verify=False), torch.device("cpu"))
    for index in range(min(limit, source.manifest.count)):
        path = task / "png" / str(source.labels[index]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.images[index].numpy()).save(path)


def first_batch(device: torch.device, make: Callable[..., Iterator[Tensor]]) -> float:
    """Seconds until a loader returns its first batch."""
    started = time.perf_counter()
    next(make(device=device))
    learners.synchronise(device)
    return time.perf_counter() - started


def rates(device: torch.device, makers: dict[str, Callable[..., Iterator[Tensor]]], rounds: int, block: float) -> dict:
    """Batches, seconds and CPU seconds per round, all ranks at once; `block`: target seconds per round."""
    loaders = {name: make(device=device) for name, make in makers.items()}
    results: dict[str, dict] = {}
    for name, loader in loaders.items():
        for _ in range(8):  # more than any loader prefetches
            next(loader)
        started, taken = time.perf_counter(), 0
        while time.perf_counter() - started < block / 2:
            next(loader)
            taken += 1
        batches = torch.tensor(2 * taken, device=device)
        dist.broadcast(batches, 0)
        results[name] = {"batches": int(batches), "cpu_seconds": []}

    def take(name: str) -> None:
        started = cpu_seconds()
        learners.finish(device, partial(next, loaders[name]), results[name]["batches"])
        results[name]["cpu_seconds"].append(cpu_seconds() - started)

    seconds = report.alternate({name: partial(take, name) for name in loaders}, rounds)
    for name, result in results.items():
        result["seconds"] = seconds[name]
        result["cpu_seconds"] = result["cpu_seconds"][-rounds:]
    return results


def cpu_seconds() -> float:
    """CPU seconds of this process and of its living children."""
    total = time.process_time()
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        user, system = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def embedded_task(folder: Path, copies: int) -> Path:
    """The embedded task `icons` (24 classes, RGB, 32 px), every image several times."""
    split, _ = embedded.make("icons")
    images, labels = np.tile(split.images, (copies, 1, 1, 1)), np.tile(split.labels, copies)
    beton.write(folder / "train", images, labels, split.class_names, pixels=images.shape[1], source="icons")
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--world-size", type=int, default=1, help="number of ranks that load at the same time (default 1)"
    )
    parser.add_argument("--data", type=Path, help="a prepared task's folder; default: embedded images of 32 px")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--workers", type=int, default=1, help="threads or processes per loader and rank (default %(default)s)"
    )
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=LOADERS, help="which to measure (default all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="approximate seconds per turn of a loader (default %(default)s)"
    )
    args = parser.parse_args(arguments)
    stages, copies = STAGES, COPIES
    if args.quick:
        stages, copies, args.rounds, args.seconds = STAGES[:1], 1, 2, 0.1
    results, rows = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch) / "task"
        if args.data is None:
            embedded_task(task, copies)
        else:
            task.mkdir()
            for name in ("train.beton", "train.json"):
                (task / name).symlink_to((args.data / name).resolve())
        write_png(task)
        for stage in stages:
            makers = {
                name: partial(open_loader, task, name, stage, batch_size=args.batch_size, workers=args.workers)
                for name in args.loaders
            }
            measured = learners.on_ranks(args.world_size, args.device, rates, makers, args.rounds, args.seconds)
            for name in () if args.quick else args.loaders:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    seconds = fresh.submit(first_batch, torch.device(args.device), makers[name]).result()
                measured[name]["first_batch_seconds"] = seconds
            results[stage] = measured
            rows += table_rows(stage, measured, args.batch_size, args.world_size)
    results["data"] = str(args.data or "embedded: icons")
    report.publish("loader", results, rows, args, args.device, args.world_size)


def table_rows(stage: str, measured: dict, batch_size: int, world_size: int) -> Iterator[dict]:
    """Images per second of all ranks, CPU time per image, and the ratio to the first loader's rate in each round."""
    rates, first = {}, next(iter(measured))
    for name, result in measured.items():
        images = batch_size * result["batches"]
        rates[name] = [world_size * images / seconds for seconds in result["seconds"]]
        yield {
            "stage": stage,
            "loader": name,
            "images/s": report.shown(report.spread(rates[name])),
            f"/ {first}": report.shown(report.ratio(rates[name], rates[first])),
            "CPU µs an image": report.shown(report.spread([1e6 * s / images for s in result["cpu_seconds"]])),
            "s to first batch": result.get("first_batch_seconds", "-"),
        }


if __name__ == "__main__":
    main()
