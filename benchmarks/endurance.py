"""A long run in small: memory, open files, threads, time and log size per step must stay flat."""

import itertools
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
times are quantiles over the samples. They depend on other load on the machine, and so does the CPU time. So a second
run is started when the first has done its steps, and both train side by side for a tenth of them, under the same load:
CPU time and time per step of the old one, divided by those of the fresh one, show what a long life costs.

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


class Training:
    """A training under torchrun, started in the background."""

    def __init__(self, folder: Path, name: str, steps: int) -> None:
        self.run, self.log = folder / name, folder / f"{name}.log"
        keys = [f"run_dir={self.run}", f"episodes={max(1, steps // 100)}"]
        line = command("train.py", "--config", folder / "endurance.yaml", *keys, ranks=RANKS)
        with self.log.open("w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.agent = subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=file, env=environment)

    def sample(self) -> dict[str, float] | None:
        """Sums over the ranks, and sizes of the logs in bytes; None while the ranks are starting or ending."""
        try:
            return self._sample()
        except (OSError, KeyError):  # the run has just ended
            return None

    def _sample(self) -> dict[str, float] | None:
        metrics, agent = self.run / "metrics.jsonl", self.agent.pid
        ranks = [Path(f"/proc/{child}") for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
        steps = re.findall(r"\nstep (\d+)/", self.log.read_text())
        if len(ranks) < RANKS or not steps or not metrics.exists():
            return None
        status = [dict(re.findall(r"(\w+):\s+(\d+)", (rank / "status").read_text())) for rank in ranks]
        ticks = [sum(map(int, (rank / "stat").read_text().rpartition(")")[2].split()[11:13])) for rank in ranks]
        return {
            "step": int(steps[-1]),
            "time, ms": 1000 * time.monotonic(),
            "CPU time, ms": 1000 * sum(ticks) / TICK,
            "resident memory, MiB": sum(int(values["VmRSS"]) for values in status) / 1024,
            "open files": sum(len(os.listdir(rank / "fd")) for rank in ranks),
            "threads": sum(int(values["Threads"]) for values in status),
            "metrics.jsonl, bytes": metrics.stat().st_size,
            "console, bytes": self.log.stat().st_size,
            "TensorBoard, bytes": sum(path.stat().st_size for path in self.run.rglob("events.*")),
            "files in the run folder": sum(1 for path in self.run.rglob("*") if path.is_file()),
        }


Samples = list[dict[str, float]]


def watch(folder: Path, steps: int, beside: int, period: float) -> tuple[Samples, list[tuple[dict, dict]]]:
    """Trains for `steps` steps, and then on while a fresh run beside it takes `beside` steps.

    Returns:
        The samples, one every `period` seconds, of the run alone; and pairs of samples, of it and of the fresh run.

    Raises:
        RuntimeError: a run failed.
    """
    old, fresh, alone, pairs = Training(folder, "run", 100 * steps), None, [], []
    try:
        while old.agent.poll() is None and (fresh is None or fresh.agent.poll() is None):
            time.sleep(period)
            values, other = old.sample(), fresh and fresh.sample()
            if values and other:
                pairs.append((values, other))
            elif values and fresh is None:
                alone.append(values)
                if values["step"] >= steps:
                    fresh = Training(folder, "fresh", beside)
    finally:  # the old one would go on for long
        old.agent.terminate()
        old.agent.wait()
    if fresh is None or fresh.agent.wait() or "with a checkpoint" not in old.log.read_text():
        raise RuntimeError("".join(run.log.read_text()[-3000:] for run in (old, fresh) if run))
    return alone, pairs


def compare(samples: Samples) -> list[dict[str, object]]:
    """First and last tenth of the samples, medians; sizes of logs and CPU time as increase per step."""
    settled = [values for values in samples if values["step"] >= samples[-1]["step"] / 20]
    size = max(2, len(settled) // PARTS)
    parts, rows = (settled[:size], settled[-size:]), []
    for key in samples[0].keys() - {"step", "time, ms"}:
        if key.endswith(("bytes", "ms")):
            rows.append((f"{key} per step", *(per_step(key, part[0], part[-1]) for part in parts)))
        else:
            rows.append((key, *(statistics.median(values[key] for values in part) for part in parts)))
    times = [step_times(part) for part in parts]
    for tenth, name in ((1, "10th percentile"), (5, "median"), (9, "90th percentile")):
        rows.append((f"step time, ms, {name}", *(part[tenth - 1] for part in times)))
    return [dict(zip(("figure", "first tenth", "last tenth"), row, strict=True)) for row in sorted(rows)]


def beside_fresh(pairs: list[tuple[dict, dict]], windows: int = 5) -> dict[str, dict[str, float]]:
    """CPU time and time per step of the old run over those of the fresh one: median, low and high over the windows.

    The first fifth of the pairs does not count: the fresh run is still warming up.
    """
    settled = pairs[len(pairs) // 5 :]
    edges = [settled[round(number * (len(settled) - 1) / windows)] for number in range(windows + 1)]
    ratios = {}
    for key in ("CPU time, ms", "time, ms"):
        costs = [
            [per_step(key, before, after) for before, after in zip(start, end, strict=True)]
            for start, end in itertools.pairwise(edges)
        ]
        ratios[key.removesuffix(", ms")] = report.spread([old / fresh for old, fresh in costs])
    return ratios


def per_step(key: str, before: dict[str, float], after: dict[str, float]) -> float:
    """Increase of a figure per step between two samples."""
    return (after[key] - before[key]) / max(1, after["step"] - before["step"])


def step_times(samples: Samples) -> list[float]:
    """The nine deciles of the time per step between two samples, in ms."""
    times = [per_step("time, ms", a, b) for a, b in itertools.pairwise(samples) if b["step"] > a["step"]]
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
        samples, pairs = watch(folder, steps, steps if args.quick else steps // 10, period=0.2 if args.quick else 2.0)
    rows, ratios = compare(samples), beside_fresh(pairs)
    print("beside a fresh run, per step:", *(f"{key} {report.shown(ratio)}" for key, ratio in ratios.items()))
    results = {
        "steps": steps,
        "compared": rows,
        "beside_fresh": ratios,
        "samples": samples[:: max(1, len(samples) // 200)],
    }
    report.publish("endurance", results, rows, args, world_size=RANKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
