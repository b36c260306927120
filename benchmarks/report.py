"""Shared by all benchmarks: timing in alternation, tables, and a dated JSON with the hardware it was measured on.

A script adds its own options to `parser(__doc__, EPILOG)`, times with `alternate`, and ends with `publish`.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dist_cts.run.folder import environment

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: --quick and --out."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="check in under a minute that the benchmark works")
    parser.add_argument(
        "--out", type=Path, help=f"folder for DATE-NAME.json (default {RESULTS}; with --quick nothing is written)"
    )
    return parser


def alternate(competitors: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each competitor in every round, after `warm_up` rounds that do not count.

    All run once per round, in reverse order in every second round, so that drift of the machine's speed affects all of
    them equally. A competitor on a GPU must synchronise before it returns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(-warm_up, rounds):
        for name in list(competitors)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            competitors[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """`spread` of the ratios within each round: a disturbance affects both sides of its ratio."""
    return spread([mine / other for mine, other in zip(seconds, baseline, strict=True)])


def shown(values: Mapping[str, float], digits: int = 3) -> str:
    """A `spread` for a table: median (low - high), each to `digits` figures."""
    median, low, high = (_figure(values[key], digits) for key in ("median", "low", "high"))
    return f"{median} ({low} - {high})"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown; the keys of the first row are the header."""
    cells = [list(rows[0]), *([_cell(row[key]) for key in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def publish(
    name: str,
    results: Mapping[str, object],
    rows: Sequence[Mapping[str, object]],
    args: argparse.Namespace,
    device: torch.device | str = "cpu",
    world_size: int = 1,
) -> None:
    """Prints the table of `rows` and writes DATE-NAME.json: date, command, commit and hardware, then `results`.

    The file goes to the folder `--out`. Without it a full run writes to benchmarks/results and a quick one writes
    nothing.
    """
    print(table(rows), flush=True)
    out = args.out or (None if args.quick else RESULTS)
    if out is None:
        return
    record = environment(torch.device(device), world_size)
    del record["host"]
    record |= {
        "command": "python " + shlex.join(record["command"]),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),  # more than the threads used: other processes were running
    }
    path = out / f"{record['date'][:10]}-{name}.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"results": results}, indent=1, allow_nan=False) + "\n")
    print(path, flush=True)


def _figure(value: float, digits: int = 3) -> str:
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def _cell(value: object) -> str:
    return _figure(value) if isinstance(value, float) else str(value)
