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


def training_seconds(run: Path) -> dict[int, float]:
    """Seconds from the first step to each logged step, by step, from metrics.jsonl."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = {record["step"]: record["steps_per_second"] for record in records if "steps_per_second" in record}
    seconds, before, total = {}, 0, 0.0
    for step, rate in rates.items():
        total += (step - before) / rate
        seconds[step], before = total, step
    return seconds
