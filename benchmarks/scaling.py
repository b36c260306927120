"""A step on 1 ... W ranks here, dry runs of 64 and 1,024 ranks, and a model of larger jobs; see --help."""

import math
import os
import statistics
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import learners, report
from benchmarks.delay_model import Send, delayed_step
from dist_cts import models
from dist_cts.distributed.placement import data_group, place
from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm
from dist_cts.flat import FlatParams
from dist_cts.models import ModelConfig

EPILOG = """\
measured  a CTS step on 1 ... W ranks with a task each, all with the same number of threads; efficiency is the time of
          one rank's step over that of W ranks
dry run   the real loop and reducer as rank 0 of 64 and of 1,024, in one process: torch's fake process group sends
          nothing; collectives and bytes are counted
model     NOT a measurement: compute + all-reduce on nodes of 8 GPUs, by the latencies with which NCCL chooses between
          its ring and its tree (src/graph/tuning.cc, protocol LL128: 1.9 and 1.25 us per hop over NVLink, 4.0 and 8.5
          us over InfiniBand, 6.6 and 6.8 us in all) and 370 GB/s of bus bandwidth (published for 8 H100 with NVLink;
          between nodes one 400 Gb/s port per GPU gives the same). For 8 GPUs it says 29 us at 1.1 MB where 25 to 32 are
          published, and 236 us at 45 MB where 195 at 34 and 267 at 50 are. No stragglers. `efficiency` overlaps
          nothing; `d = 1` has method.delay=1. Two sites: 50 ms one way and 10 Gbit/s between them, an all-reduce within
          each site and one exchange between them; as many reductions in flight as the delay.
          benchmarks/slow_network.py compares the delay's model with measurements.

  python benchmarks/scaling.py --world-size 2
  torchrun --nnodes=2 --nproc_per_node=8 benchmarks/scaling.py --device cuda        (all of its ranks, no smaller jobs)
"""
MODELS = ("resnet20", "resnet18")
NODE = 8  # GPUs
BANDWIDTH = 370e9  # bytes per second


def measured_step(device: torch.device, model: str, batch_size: int, pixels: int, rounds: int, ranks: int) -> dict:
    """Seconds of each step and of each all-reduce of its buffer, on every rank of this process group."""
    learners.share_cores(ranks)
    noise = learners.Noise(device, pixels=pixels)
    cts = learners.MetaTraining([learners.make_learner(noise, model, batch_size)], dist.get_world_size())
    zeros = cts.phi.new_zeros(cts.reducer.message_numel)
    competitors = {
        "step": lambda: learners.finish(device, cts.step),
        "all_reduce": lambda: learners.finish(device, lambda: dist.all_reduce(zeros)),
    }
    return report.alternate(competitors, rounds, warm_up=3)


class Sent(TorchDispatchMode):
    """Counts collectives and their bytes; acts as if every peer of the fake group sent the same as this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            assert function.overloadpacket.__name__ == "allreduce_", (
                f"collective {function} is not counted; add its bytes here"
            )
            tensors, group = args[0], dist.ProcessGroup.unbox(args[1])
            self.collectives += 1
            for tensor in tensors:
                self.bytes += tensor.nbytes
                tensor.mul_(group.size())
        return result


def dry_run(tasks: int, world_size: int, model: str, steps: int = 3) -> dict[str, float]:
    """Placement, collectives and bytes sent per rank and step, for T tasks on W ranks."""
    placements = [place(tasks, world_size, rank) for rank in range(world_size)]
    assert {task for placement in placements for task in placement.local_tasks} == set(range(tasks))
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    noise = learners.Noise(torch.device("cpu"), pixels=8, count=16)
    own = [learners.make_learner(noise, model, 4) for _ in placements[0].local_tasks]
    group = data_group(placements[0])
    for learner in own:
        learner.data_group, learner.model = group, convert_sync_batch_norm(learner.model, group)
    cts = learners.MetaTraining(own, tasks)
    with Sent() as sent:
        for _ in range(steps):
            cts.step()
    dist.destroy_process_group()
    return {
        "tasks": tasks,
        "ranks": world_size,
        "tasks a rank": max(len(placement.local_tasks) for placement in placements),
        "ranks a task": placements[0].data_ranks,
        "collectives a step": sent.collectives / steps,
        "bytes a step": sent.bytes / steps,
        "of which the meta-update's": 4 * cts.reducer.message_numel,
    }


def all_reduce_seconds(size: int, gpus: int) -> dict[str, float]:
    """Seconds to add up `size` bytes over GPUs on nodes of eight, by NCCL's ring and by its tree."""
    nodes = math.ceil(gpus / NODE)
    between = 2 * nodes if nodes > 1 else 0  # of the ring's 2 (W - 1) hops
    ring = 6.6e-6 + 1.9e-6 * (2 * (gpus - 1) - between) + 4.0e-6 * between
    tree = 6.8e-6 + 2 * (1.25e-6 * (min(gpus, NODE) - 1) + 8.5e-6 * math.log2(nodes))
    moving = 2 * (gpus - 1) / gpus * size / BANDWIDTH
    return {"ring": ring + moving, "tree": tree + moving}


def model_rows(name: str, numel: int, compute_ms: list[float]) -> Iterator[dict[str, object]]:
    """The model's table, with the share of computing in a step for each time that it may take."""
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        seconds = all_reduce_seconds(4 * (numel + 2 + gpus + 4 * gpus), gpus)  # one task per GPU, plus the control tail
        best = min(seconds, key=seconds.get)
        row = {"MODEL": name, "GPUs": gpus, "all-reduce ms": 1e3 * seconds[best], "by": best}
        for compute in compute_ms:
            row[f"efficiency at {compute:g} ms"] = compute / (compute + row["all-reduce ms"])
            late = delayed_step(compute / 1e3, [Send(seconds[best], 0)], 1)  # NCCL runs one all-reduce at a time
            row[f"d = 1 at {compute:g} ms"] = compute / 1e3 / late
        yield row


def far_rows(name: str, numel: int, compute_ms: float = 100, mbit: float = 10_000) -> Iterator[dict[str, object]]:
    """The model's table for two sites of W / 2 GPUs with 50 ms one way between them, by delay."""
    for gpus in (16, 128, 1024):
        size = 4 * (numel + 2 + gpus + 4 * gpus)
        wire = size / (mbit * 1e6 / 8)
        seconds = (
            min(all_reduce_seconds(size, gpus // 2).values()) + 2 * 0.05 + wire
        )  # within a site, then between them
        row = {"MODEL, two sites": name, "GPUs": gpus, "compute ms": compute_ms, "all-reduce ms": 1e3 * seconds}
        for delay in (0, 1, 2, 4):
            step = delayed_step(compute_ms / 1e3, [Send(wire, seconds - wire)], delay)
            row[f"efficiency, d = {delay}"] = compute_ms / 1e3 / step
        yield row


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--world-size", type=int, default=2, help="maximum number of ranks to start (default %(default)s)"
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compute-ms", type=float, nargs="+", default=[1, 10, 100], help="of a step, for the model")
    args = parser.parse_args(arguments)
    layouts = [(tasks, ranks) for ranks in (64, 1024) for tasks in (ranks // 8, ranks, 4 * ranks)]
    if args.quick:
        args.model, args.batch_size, args.pixels, args.rounds, layouts = "tiny", 8, 16, 3, layouts[:2]
    settings = (args.model, args.batch_size, args.pixels, args.rounds, args.world_size)
    counts = [args.world_size] if "RANK" in os.environ else range(1, args.world_size + 1)
    measured = {ranks: learners.on_ranks(ranks, args.device, measured_step, *settings) for ranks in counts}
    if None in measured.values():
        return  # torchrun's ranks above 0
    rows, alone = [], statistics.median(measured[counts[0]]["step"])
    for ranks, seconds in measured.items():
        row = {"measured": args.model, "ranks": ranks}
        for name, values in seconds.items():
            row[f"{name}, ms"] = report.shown(report.spread([1e3 * value for value in values]))
        rows.append(row | {"efficiency": alone / statistics.median(seconds["step"])})
    dry = [dry_run(tasks, ranks, args.model) for tasks, ranks in layouts]
    model = [row for name in MODELS for row in model_rows(name, body_size(name), args.compute_ms)]
    far = [row for name in MODELS for row in far_rows(name, body_size(name))]
    print(report.table(rows), report.table(dry), report.table(far), sep="\n\n", end="\n\n")
    results = {"model": args.model, "batch_size": args.batch_size, "pixels": args.pixels, "measured": measured}
    results |= {"dry_run": dry, "MODEL, not measured": model, "MODEL, two sites": far}
    report.publish("scaling", results, model, args, args.device, args.world_size)


def body_size(name: str) -> int:
    """N of a model."""
    module, head = models.build(ModelConfig(name=name), 10, 0)
    return FlatParams(module, head).body.numel()


if __name__ == "__main__":
    main()
