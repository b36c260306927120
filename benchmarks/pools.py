"""`tasks_per_episode`: memory and time per step with N learners and T tasks, on 2 ranks; see --help."""

import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import parser, publish
from benchmarks.runs import command, training_seconds
from dist_cts.data import beton

EPILOG = """\
Runs of launch/train.py on 2 ranks: tasks of 64 random images of 16 x 16 pixels, the network tiny, SGD with momentum.
Memory is the largest of a rank, with what the tasks that rest keep in it. Time per step leaves out the first episode.

  python benchmarks/pools.py
"""
CASES = ((8, 100), (8, 1000), (32, 1000))  # N, T
QUICK = ((2, 4), (2, 8))


def write_tasks(folder: Path, count: int, images: int = 64, pixels: int = 16) -> None:
    """Tasks t0 to t<count - 1> of two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        labels = np.arange(images) % 2
        noise = generator.integers(0, 256, (images, pixels, pixels, 3), dtype=np.uint8)
        beton.write(folder / f"t{number}" / "train", noise, labels, ["0", "1"], pixels=pixels, source="noise")


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []
    return children + [other for child in children for other in descendants(child)]


def peak_mib(pid: int) -> float:
    """The largest resident memory that a process has had."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def measure(data: Path, run: Path, N: int, T: int, episodes: int, K: int) -> dict[str, float]:
    """Peak memory of a rank in MiB, and seconds per step."""
    names = ", ".join(f"t{number}" for number in range(T))
    keys = [f"tasks=[{names}]", f"tasks_per_episode={N}", f"episodes={episodes}", f"inner_steps={K}", "batch_size=16"]
    keys += [f"data.root={data}", f"run_dir={run}", f"log_every={K}", "model={name: tiny}", "loggers=[]", "device=cpu"]
    keys += ["checkpoint.every_steps=0"]
    with (run.parent / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(command("train.py", "--config", "pool", *keys, ranks=2), stdout=log, stderr=log)
        peak = 0.0
        while process.poll() is None:
            peak = max([peak, *map(peak_mib, descendants(process.pid))])
            time.sleep(0.1)
    assert process.returncode == 0, Path(log.name).read_text()
    seconds = training_seconds(run)
    return {"peak_mib": peak, "seconds_per_step": (seconds[episodes * K] - seconds[K]) / ((episodes - 1) * K)}


def main(arguments: list[str] | None = None) -> None:
    args = parser(__doc__, EPILOG).parse_args(arguments)
    cases, episodes, K = (QUICK, 2, 2) if args.quick else (CASES, 20, 20)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder) / "data", max(T for _, T in cases))
        measured = [
            {"N": N, "T": T} | measure(Path(folder) / "data", Path(folder) / f"{N}-{T}", N, T, episodes, K)
            for N, T in cases
        ]
    rows = [
        {
            "N": case["N"],
            "T": case["T"],
            "peak memory of a rank, MiB": round(case["peak_mib"]),
            "ms per step": 1e3 * case["seconds_per_step"],
        }
        for case in measured
    ]
    publish("pools", {"cases": measured, "episodes": episodes, "inner_steps": K}, rows, args, world_size=2)


if __name__ == "__main__":
    main()
