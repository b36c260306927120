"""The commands of launch/ as child processes, and the metrics that their runs leave."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(script: str, *arguments: object, ranks: int | None = None, options: Sequence[str] = ()) -> list[str]:
    """Command line of launch/SCRIPT: by torchrun on `ranks` processes of this machine, or as one plain process."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options)
    return [sys.executable, *(torchrun if ranks else ()), str(ROOT / "launch" / script), *map(str, arguments)]


def task_average_loss(run: Path) -> tuple[list[int], list[float]]:
    """Cumulative inner steps, summed over the tasks, and the mean loss over the tasks (Figure 6a).

    One value for every record in `run`/metrics.jsonl; where a run resumed from a checkpoint, the later record counts.
    """
    losses: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            losses.setdefault(record["cumulative_inner_steps"], {})[record["task"]] = record["loss"]
    steps = sorted(losses)
    return steps, [sum(losses[step].values()) / len(losses[step]) for step in steps]


def training_seconds(run: Path) -> dict[int, float]:
    """Seconds from the first step to each logged step, by step, from metrics.jsonl."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = {record["step"]: record["steps_per_second"] for record in records if "steps_per_second" in record}
    seconds, before, total = {}, 0, 0.0
    for step, rate in rates.items():
        total += (step - before) / rate
        seconds[step], before = total, step
    return seconds
