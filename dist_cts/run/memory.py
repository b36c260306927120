"""Whether a step fits into a rank's memory: a lower bound, so that what cannot fit is refused instead of killed."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

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
    sharing: int = 1,
    at_once: int = 0,
) -> list[str]:
    """Checks the batch size of every prepared task, by name, before anything of that size is allocated.

    The tasks are spread over the ranks; `sharing` ranks divide each batch. `at_once`: number of tasks whose images
    are in memory at the same time; 0: all.

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
    tried: dict[tuple[int, int], float] = {}
    for name, manifest in manifests.items():
        images = sizes[name] / sharing
        needed = images * (5 * _image_bytes(manifest) + PLAN_BYTES)  # as uint8 and as float32
        key = manifest.pixels, manifest.classes
        if needed * CERTAIN > free and needed <= free:
            if key not in tried:
                tried[key] = saved_bytes(model, *key, device, bf16)
            needed += images * tried[key]
        if needed > free:
            raise ValueError(
                f"batch_size={sizes[name]}: a step of task {name} needs at least {needed / GIB:.1f} GiB, "
                f"{free / GIB:.1f} GiB are free per rank; lower batch_size"
            )
    return [
        f"warning: task {name}: batch_size={sizes[name]} exceeds its {manifest.count} training images; "
        "every batch repeats some of them"
        for name, manifest in manifests.items()
        if sizes[name] > manifest.count
    ]


def saved_bytes(config: ModelConfig, pixels: int, classes: int, device: torch.device, bf16: bool = False) -> float:
    """Bytes per image that a forward pass keeps for its backward pass."""
    model, _ = models.build(config, classes, "memory")
    model.to(device)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(2, 3, pixels, pixels, device=device)  # batch norm may need more than one
    devices = [device] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with torch.random.fork_rng(devices), autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)  # holds the graph, and with it what the graph keeps
    del logits
    return sum(size for storage, size in kept.items() if storage not in own) / len(images)


def free_bytes(device: torch.device) -> float:
    """Free memory of the device for this rank; on a CPU an equal share of the host's, or of its control group's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host_bytes(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float:
    free = float("inf")
    with suppress(OSError, ValueError, StopIteration):
        free = 1024 * int(next(line for line in proc.open() if line.startswith("MemAvailable")).split()[1])
    for limit, used, cache in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):  # no control groups, or no limit
            stat = dict(line.split() for line in (group / cache).read_text().splitlines())
            in_use = int((group / used).read_text()) - int(stat.get("inactive_file", 0))
            free = min(free, int((group / limit).read_text()) - in_use)
    return free


def _image_bytes(manifest: Manifest) -> int:
    return 3 * manifest.pixels**2
