"""From the command to the first step: torchrun, imports, process group, verified files, first batches; see --help."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import report
from benchmarks.runs import ROOT, command
from benchmarks.time_to_quality import TASKS
from dist_cts.data.prepare import catalog
from dist_cts.data.prepare.task import Options, prepare

EPILOG = """\
A round starts each of these once, one task per rank, with a small model:
  import torch  one process per rank that only imports torch: a lower bound
  device        torchrun on a run of one step, images in device memory, from the command to its end
  stream        the same, streamed by FFCV: every rank imports it and compiles its decoder

  python benchmarks/start_up.py --world-size 8
"""
KEYS = ("inner_steps=1", "episodes=1", "log_every=1", "batch_size=8", "model.name=tiny", "checkpoint.every_steps=0")


def import_torch(world_size: int) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(world_size)]
    if any([process.wait() for process in processes]):
        raise SystemExit("a process could not import torch")


def one_step(world_size: int, data: Path, cache: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"tasks=[{','.join(TASKS[:world_size])}]", f"run_dir={folder}/run", f"data.root={data}"]
        arguments = ["--config", "configs/demo.yaml", *keys, f"data.cache={cache}", *KEYS]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        training = command("train.py", *arguments, ranks=world_size)
        done = subprocess.run(training, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--world-size", type=int, default=8, help="ranks, 1 to 8 (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    if args.quick:
        args.world_size, args.rounds = 1, 1
    with tempfile.TemporaryDirectory() as folder:
        for name in TASKS[: args.world_size]:
            prepare(catalog.entry(catalog.EMBEDDED + name), None, Path(folder) / name, Options())
        competitors = {"import torch": partial(import_torch, args.world_size)}
        competitors |= {
            cache: partial(one_step, args.world_size, Path(folder), cache) for cache in ("device", "stream")
        }
        seconds = report.alternate(competitors, args.rounds, warm_up=0 if args.quick else 1)
    rows = [{"started": name, "s": report.shown(report.spread(values))} for name, values in seconds.items()]
    report.publish("start-up", {"seconds": seconds}, rows, args, world_size=args.world_size)


if __name__ == "__main__":
    main()
