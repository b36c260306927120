"""A long run in small: memory, open files, threads, time and log size per step must stay flat."""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.runs import ROOT, command

EPILOG = """\
Two ranks train a tiny network on two small tasks for --steps steps, with a checkpoint every 500. Both ranks are sampled
during the run; the table compares the first and the last tenth of the samples after the first 5 % of the steps. Step
times are quantiles over the samples. They depend on other load on the machine, and so does the CPU time.

  python benchmarks/endurance.py --steps 100000
"""
RANKS, PARTS = 2, 10
TICK = os.sysconf("SC_CLK_TCK")  # per second
CONFIG = """\
tasks: [shapes, colours]
inner_steps: 100
batch_size: 4
meta_lr: 0.05
log_every: 50
device: cpu
model: {{name: tiny}}
data: {{root: {data}}}
checkpoint: {{every_steps: 500}}
"""


def sample(agent: subprocess.Popen, run: Path, log: Path) -> dict[str, float] | None:
    """Sums over the ranks, and sizes of the logs in bytes; None while the ranks are starting or ending."""
    metrics = run / "metrics.jsonl"
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = [Path(f"/proc/{child}") for child in children]
    steps = re.findall(r"\nstep (\d+)/", log.read_text())
    if len(ranks) < RANKS or not steps or not metrics.exists():
        return None
    status = [dict(re.findall(r"(\w+):\s+(\d+)", (rank / "status").read_text())) for rank in ranks]
    ticks = [sum(map(int, (rank / "stat").read_text().rpartition(")")[2].split()[11:13])) for rank in ranks]
    return {
        "step": int(steps[-1]),
        "time": time.monotonic(),
        "CPU time, ms": 1000 * sum(ticks) / TICK,
        "resident memory, MiB": sum(int(values["VmRSS"]) for values in status) / 1024,
        "open files": sum(len(os.listdir(rank / "fd")) for rank in ranks),
        "threads": sum(int(values["Threads"]) for values in status),
        "metrics.jsonl, bytes": metrics.stat().st_size,
        "console, bytes": log.stat().st_size,
        "TensorBoard, bytes": sum(path.stat().st_size for path in run.rglob("events.*")),
        "files in the run folder": sum(1 for path in run.rglob("*") if path.is_file()),
    }


def watch(folder: Path, steps: int, period: float) -> list[dict[str, float]]:
    """Runs the training to its end and samples it every `period` seconds.

    Raises:
        RuntimeError: the run failed.
    """
    keys = [f"run_dir={folder / 'run'}", f"episodes={max(1, steps // 100)}"]
    log, samples = folder / "log", []
    with log.open("w") as file:
        line = command("train.py", "--config", folder / "endurance.yaml", *keys, ranks=RANKS)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=file, env=environment)
    while agent.poll() is None:
        time.sleep(period)
        try:
            if values := sample(agent, folder / "run", log):
                samples.append(values)
        except (OSError, KeyError):  # the run has just ended
            continue
    if agent.returncode:
        raise RuntimeError(log.read_text()[-3000:])
    return samples


def compare(samples: list[dict[str, float]]) -> list[dict[str, object]]:
    """First and last tenth of the samples, medians; sizes of logs and CPU time as increase per step."""
    settled = [values for values in samples if values["step"] >= samples[-1]["step"] / 20]
    size = max(2, len(settled) // PARTS)
    parts, rows = (settled[:size], settled[-size:]), []
    for key in samples[0].keys() - {"step", "time"}:
        if key.endswith(("bytes", "ms")):
            steps = [max(1, part[-1]["step"] - part[0]["step"]) for part in parts]
            rows.append(
                (f"{key} per step", *((part[-1][key] - part[0][key]) / n for part, n in zip(parts, steps, strict=True)))
            )
        else:
            rows.append((key, *(statistics.median(values[key] for values in part) for part in parts)))
    times = [step_times(part) for part in parts]
    for tenth, name in ((1, "10th percentile"), (5, "median"), (9, "90th percentile")):
        rows.append((f"step time, ms, {name}", *(part[tenth - 1] for part in times)))
    return [dict(zip(("figure", "first tenth", "last tenth"), row, strict=True)) for row in sorted(rows)]


def step_times(samples: list[dict[str, float]]) -> list[float]:
    """The nine deciles of the time per step between two samples, in ms."""
    moved = [(a, b) for a, b in itertools.pairwise(samples) if b["step"] > a["step"]]
    times = [1000 * (b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in moved]
    return statistics.quantiles(times * 2 if len(times) == 1 else times or [0, 0], n=10)


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--steps", type=int, default=100_000, help="inner steps (default 100000; 500 with --quick)")
    args = parser.parse_args(arguments)
    steps = 500 if args.quick else args.steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("shapes", "colours"):
            prepare = command("prepare.py", f"embedded:{name}", "--out", folder / "data")
            subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
        (folder / "endurance.yaml").write_text(CONFIG.format(data=folder / "data"))
        samples = watch(folder, steps, period=0.2 if args.quick else 2.0)
        written = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = compare(samples)
    results = {
        "steps": steps,
        "records": len(written),
        "compared": rows,
        "samples": samples[:: max(1, len(samples) // 200)],
    }
    report.publish("endurance", results, rows, args, world_size=RANKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
