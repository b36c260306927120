"""Where a training step's time goes: kernels per step, gaps between them, the meta-update's share; see --help."""

import gzip
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import learners, report

EPILOG = """\
The profiler records steps of the real loop. On a GPU its kernels and copies are counted, on a CPU the outermost
operations of PyTorch. A kernel belongs to the part of the step in which the host launched it: the tasks' inner steps,
or the meta-update, which is the rest (meta-gradients, all-reduce, phi, shifts). `idle` is the share of the time between
the first and the last kernel in which none ran: the device waits for the host. The profiler slows down the host, so
that `idle` is an upper bound. With --out, the trace is written there, too, for https://ui.perfetto.dev.

  python benchmarks/step_trace.py --device cuda --model resnet20 --tasks 1 8 --precision bf16 --channels-last
"""
STEP, INNER_STEP = "training step", "inner step"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
Interval = tuple[float, float]


def traced_steps(
    device: torch.device, shape: tuple[str, int, int], tasks: int, steps: int, numerics: learners.Numerics, path: Path
) -> None:
    """Writes a Chrome trace of `steps` steps of `tasks` learners, (model, batch size, pixels), to `path` (.json.gz)."""
    model, batch_size, pixels = shape
    noise = learners.Noise(device, pixels=pixels)
    own = [learners.make_learner(noise, model, batch_size, numerics) for _ in range(tasks)]
    cts = learners.MetaTraining(own, tasks)
    for _ in range(5):
        cts.step()
    learners.synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with ExitStack() as stack:
        for learner in own:
            named = record_function(INNER_STEP)(learner.inner_step)
            stack.enter_context(mock.patch.object(learner, "inner_step", named))
        profiler = stack.enter_context(profile(activities=activities))
        for _ in range(steps):
            with record_function(STEP):
                cts.step()
        learners.synchronise(device)
    profiler.export_chrome_trace(str(path))


def summarise(events: Iterable[Mapping], steps: int) -> dict:
    """Per step, from a trace's events: counts and milliseconds of the inner steps and of the meta-update.

    `longest_gap_ms` and `idle_share` are of the device's whole time line; `by_kernel` has the milliseconds per step of
    the most expensive kernels.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    whole, inner = (_ranges(complete, name) for name in (STEP, INNER_STEP))
    work = [(event, at) for event, at in _work(complete) if _within(at, whole)]
    busy = _union(_interval(event) for event, _ in work)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(busy)]
    total = sum(end - start for start, end in busy)
    span = busy[-1][1] - busy[0][0]
    parts: dict[str, list] = {"inner steps": [], "meta-update": []}
    by_kernel = Counter[str]()
    for event, at in work:
        parts["inner steps" if _within(at, inner) else "meta-update"].append(event)
        by_kernel[event["name"]] += event["dur"]
    milliseconds = {
        name: sum(end - start for start, end in _union(map(_interval, part))) / 1e3 / steps
        for name, part in parts.items()
    }
    host = {name: sum(end - start for start, end in found) for name, found in (("step", whole), ("inner", inner))}
    return {
        "kernels": {name: len(part) / steps for name, part in parts.items()},
        "busy_ms": milliseconds,
        "meta_update_share": milliseconds["meta-update"] / sum(milliseconds.values()),
        "meta_update_share_of_host": 1 - host["inner"] / host["step"],
        "step_ms": span / 1e3 / steps,
        "idle_share": 1 - total / span,
        "longest_gap_ms": max(gaps, default=0.0) / 1e3,
        "by_kernel": {name: value / 1e3 / steps for name, value in by_kernel.most_common(10)},
    }


def _work(events: Sequence[Mapping]) -> Iterator[tuple[Mapping, float]]:
    """What the device ran, each with the host's time of its launch: GPU work, or a CPU's outermost operations."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    on_device = [event for event in events if event.get("cat") in DEVICE_WORK]
    if on_device:
        yield from ((event, launches.get(event["args"]["correlation"], event["ts"])) for event in on_device)
        return
    ends: dict[object, float] = {}
    operations = (event for event in events if event.get("cat") == "cpu_op")
    for event in sorted(operations, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= ends.get(event["tid"], 0.0):
            ends[event["tid"]] = event["ts"] + event["dur"]
            yield event, event["ts"]


def _interval(event: Mapping) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _ranges(events: Iterable[Mapping], name: str) -> list[Interval]:
    return sorted(
        _interval(event) for event in events if (event.get("cat"), event["name"]) == ("user_annotation", name)
    )


def _within(at: float, ranges: Iterable[Interval]) -> bool:
    return any(start <= at <= end for start, end in ranges)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same time: kernels overlap on several streams."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1], help="T, on one device (default 1)")
    parser.add_argument("--steps", type=int, default=20, help="to record (default %(default)s)")
    learners.Numerics.add_arguments(parser)
    args = parser.parse_args(arguments)
    numerics = learners.Numerics.of(args)
    if args.quick:
        args.model, args.batch_size, args.pixels, args.steps = "tiny", 8, 16, 3
    shape, results, rows = (args.model, args.batch_size, args.pixels), {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for tasks in args.tasks:
            path = Path(scratch) / f"step-trace-{tasks}-tasks.json.gz"
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                path = args.out / path.name
            learners.on_ranks(1, args.device, traced_steps, shape, tasks, args.steps, numerics, path, numerics=numerics)
            with gzip.open(path) as file:
                found = summarise(json.load(file)["traceEvents"], args.steps)
            results[str(tasks)] = found
            rows.append(table_row(tasks, found))
            print(report.table([{"most expensive": k, "ms per step": v} for k, v in found["by_kernel"].items()]))
            print()
    settings = {"model": args.model, "batch_size": args.batch_size, "pixels": args.pixels, "steps": args.steps}
    results = settings | asdict(numerics) | {"tasks": results}
    report.publish("step-trace", results, rows, args, args.device)


def table_row(tasks: int, found: Mapping) -> dict[str, object]:
    """One line of the table: counts, milliseconds and shares per step."""
    return {
        "tasks": tasks,
        "kernels per step": sum(found["kernels"].values()),
        "of the meta-update": found["kernels"]["meta-update"],
        "ms per step": found["step_ms"],
        "idle, %": 100 * found["idle_share"],
        "longest gap, ms": found["longest_gap_ms"],
        "meta-update, % of busy time": 100 * found["meta_update_share"],
        "meta-update, % of host time": 100 * found["meta_update_share_of_host"],
    }


if __name__ == "__main__":
    main()
