"""Whether a step fits into a rank's memory: a lower bound, so that what cannot fit is refused instead of killed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from dist_cts import models
from dist_cts.data.batches import CHUNK_STEPS, DataConfig
from dist_cts.data.datasets import DATASETS
from dist_cts.data.manifest import Manifest, read_manifest
from dist_cts.models import ModelConfig

PLAN_BYTES = 2 * CHUNK_STEPS * 13  # of two chunks of the sample plan, per image of a batch
CERTAIN = 1000  # free memory over the bytes of a batch above which no model is tried: saves a forward pass
GIB = 2**30


def check_batches(
    sizes: Mapping[str, int],
    model: ModelConfig,
    data: DataConfig,
    device: torch.device,
    *,
    bf16: bool = False,
    sharing: float = 1,
    at_once: int = 0,
) -> list[str]:
    """Checks the batch size of every prepared task, by name, before anything of that size is allocated.

    The tasks are spread over the ranks; `sharing` ranks divide each batch, 1 / S: a step takes S batches. `at_once`:
    number of tasks whose images are in memory at the same time; 0: all.

    Returns:
        Warnings: batches that are larger than their task's training split.

    Raises:
        ValueError: the images, or a step on a batch, need more than this rank's free memory.
    """
    manifests = {}
    for name in (name for name in sizes if name not in DATASETS):
        with suppress(OSError, ValueError):  # missing or damaged tasks are reported where they are opened
            manifests[name] = read_manifest(data.root / name / "train")
    ranks, free = min(dist.get_world_size(), len(sizes)), free_bytes(device)
    held = [manifest.count * _image_bytes(manifest) for manifest in manifests.values()]
    if data.cache == "auto":
        held = [size for size in held if size <= data.resident_limit_gib * GIB]
    held = sorted(held)[-at_once:]
    if data.cache != "stream" and sum(held) / ranks > free:
        raise ValueError(
            f"data.cache={data.cache}: the tasks' images need {sum(held) / ranks / GIB:.1f} GiB per rank, "
            f"{free / GIB:.1f} GiB are free; set data.cache=stream"
        )
    tried = cache(partial(_saved_by_images, model, device=device, bf16=bf16))
    for name, manifest in manifests.items():
        per_image = 5 * _image_bytes(manifest) + PLAN_BYTES  # as uint8 and as float32
        saved = partial(tried, manifest.pixels, manifest.classes)
        _check_step(name, sizes[name], sizes[name] / sharing * per_image, sizes[name] / sharing, saved, free)
    return [
        f"warning: task {name}: batch_size={sizes[name]} exceeds its {manifest.count} training images; "
        "every batch repeats some of them"
        for name, manifest in manifests.items()
        if sizes[name] > manifest.count
    ]


def check_dataset(
    name: str,
    batch_size: int,
    inputs: Any,
    model: ModelConfig,
    classes: int,
    device: torch.device,
    *,
    bf16: bool = False,
    sharing: float = 1,
) -> None:
    """As `check_batches` for a task that is a dataset, whose first two examples have the given `inputs`.

    Raises:
        ValueError: a step on a batch needs more than this rank's free memory.
    """
    examples = batch_size / sharing
    size = sum(tensor.nbytes for tensor in tree_leaves(inputs)) / 2
    _check_step(
        name,
        batch_size,
        examples * size,
        examples,
        lambda: saved_bytes(model, inputs, classes, device, bf16),
        free_bytes(device),
    )


def _check_step(
    name: str, batch_size: int, needed: float, examples: float, saved: Callable[[], float], free: float
) -> None:
    """`needed`: bytes of a batch of so many examples; `saved`: bytes that the model keeps of each, if it matters."""
    if needed * CERTAIN > free and needed <= free:
        needed += examples * saved()
    if needed > free:
        raise ValueError(
            f"batch_size={batch_size}: a step of task {name} needs at least {needed / GIB:.1f} GiB, "
            f"{free / GIB:.1f} GiB are free per rank; lower batch_size"
        )


def _saved_by_images(config: ModelConfig, pixels: int, classes: int, *, device: torch.device, bf16: bool) -> float:
    images = torch.zeros(2, 3, pixels, pixels, device=device)  # batch norm may need more than one
    return saved_bytes(config, images, classes, device, bf16)


def saved_bytes(config: ModelConfig, inputs: Any, classes: int, device: torch.device, bf16: bool = False) -> float:
    """Bytes per example that a forward pass keeps for its backward pass; `inputs`: those of two examples."""
    model, _ = models.build(config, classes, "memory")
    model.to(device)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [device] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with torch.random.fork_rng(devices), autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(inputs)  # holds the graph, and with it what the graph keeps
    del outputs
    return sum(size for storage, size in kept.items() if storage not in own) / 2


def free_bytes(device: torch.device) -> float:
    """Free memory of the device for this rank; on a CPU an equal share of the host's, or of its control group's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host_bytes(
    meminfo: Path = Path("/proc/meminfo"), own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    free = float("inf")
    with suppress(OSError, ValueError, StopIteration):
        free = 1024 * int(next(line for line in meminfo.open() if line.startswith("MemAvailable")).split()[1])
    return min([free, *_control_groups(own, root)])


def _control_groups(own: Path, root: Path) -> Iterator[float]:
    """Free memory of this process's control group, such as a job's, and of those above; version 1 or 2."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            names = "memory.limit_in_bytes memory.usage_in_bytes" if controllers else "memory.max memory.current"
            group = root / controllers / path.lstrip("/")
            for folder in (group, *group.parents[: path.strip("/").count("/") + 1]):
                with suppress(OSError, ValueError):  # no limit; in a container, the path may be the host's
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    limit, used = (int((folder / name).read_text()) for name in names.split())
                    yield limit - used + int(stat.get("inactive_file", 0))


def _image_bytes(manifest: Manifest) -> int:
    return 3 * manifest.pixels**2
