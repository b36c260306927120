"""Kills ranks and torchrun at random and compares phi with that of an uninterrupted run; see --help."""

import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks import report
from benchmarks.runs import ROOT, command
from dist_cts.run import folder as run_folder

EPILOG = """\
A run of two small tasks on two ranks, by `torchrun --max-restarts`, gets SIGKILL at seeded random times, one in
five during start-up, the others during training. The victim is a rank, or torchrun itself, which is then started again.
After ten kills the run is completed. A kill is survived if phi is then bit-identical to that of an uninterrupted run.
A restart is the time from a kill to the first step logged after it.

  python benchmarks/soak.py --kills 100
"""
VICTIMS, KILLS_A_RUN, INNER_STEPS, HANG = ("rank 0", "rank 1", "torchrun"), 10, 10, 120.0  # HANG in seconds
CONFIG = """\
tasks: [shapes, colours]
inner_steps: {inner_steps}
batch_size: 4
meta_lr: 0.5
reduction: ordered
log_every: 5
device: cpu
model: {{name: tiny}}
data: {{root: {data}}}
checkpoint: {{every_steps: 25}}
"""


class Run:
    """A run that is being killed: its torchrun process, and the log of all its starts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.killed_at, self._seen = folder, time.monotonic(), 0
        self._start()

    def kill(self, victim: str) -> None:
        ranks, agent = self._order_in_class(), self.agent
        self.killed_at, self._seen = time.monotonic(), len(self.log())
        if victim == "torchrun" or len(ranks) < 2:  # its ranks have not started yet
            agent.kill()
            agent.wait()
            while not self._free():  # its ranks exit on their own
                self._look_at_the_clock()
            self._start()
        else:
            os.kill(ranks[VICTIMS.index(victim)], signal.SIGKILL)

    def await_step(self) -> float:
        """Waits for the first logged step after the latest kill; returns the seconds since that kill."""
        while not re.search(r"gradient evaluations(.|\n)*\nstep \d+/", self.log()[self._seen :]):
            self._look_at_the_clock()
        return time.monotonic() - self.killed_at

    def finish(self) -> int:
        """Stops the run with a checkpoint, lets it finish one episode later, returns the number of episodes."""
        self.agent.send_signal(signal.SIGTERM)
        self.agent.wait(HANG)
        episodes = int(re.findall(r"stopped at step (\d+)", self.log())[-1]) // INNER_STEPS + 2
        self._start(episodes)
        if self.agent.wait(HANG):
            raise RuntimeError(self.log()[-5000:])
        return episodes

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def _start(self, episodes: int = 10**6) -> None:
        self.agent = launch(self.folder, episodes, "run", ranks=2, options=("--max-restarts=1000",))

    def _free(self) -> bool:
        """Whether no rank holds the run's folder."""
        try:
            run_folder.claim(self.folder / "run").close()
        except ValueError:
            return False
        return True

    def _order_in_class(self) -> list[int]:
        """Process ids, lowest rank first."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        return [int(child) for child in children.read_text().split()]

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self.killed_at + HANG:
            raise TimeoutError(f"{HANG:.0f} s without a step after a kill: {self.log()[-5000:]}")
        time.sleep(0.02)


def launch(folder: Path, episodes: int, run: str, **torchrun: Any) -> subprocess.Popen:
    """A training that logs to FOLDER/log; `torchrun`: ranks and options of `runs.command`."""
    keys = ["--config", f"{folder.parent}/soak.yaml", f"run_dir={folder / run}", f"episodes={episodes}"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command("train.py", *keys, **torchrun), cwd=ROOT, stdout=log, stderr=log, env=threads)


def soak(folder: Path, rng: random.Random, kills: int) -> tuple[list[tuple[str, float | None]], bool]:
    """Victims with restart seconds (None if killed again first), and whether phi is then bit-identical."""
    run = Run(folder)
    run.await_step()
    hits: list[tuple[str, float | None]] = []
    for number in range(kills):
        victim = rng.choice(VICTIMS)
        run.kill(victim)
        if number + 1 < kills and rng.random() < 0.2:
            hits.append((victim, None))
            time.sleep(rng.uniform(0, 5))
        else:
            hits.append((victim, run.await_step()))
            time.sleep(rng.uniform(0, 1))
    episodes = run.finish()
    if launch(folder, episodes, "uninterrupted").wait():
        raise RuntimeError(run.log()[-5000:])
    phis = [safetensors.torch.load_file(folder / name / "phi.safetensors") for name in ("run", "uninterrupted")]
    return hits, all(torch.equal(phis[0][name], phis[1][name]) for name in phis[0].keys() | phis[1].keys())


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default 100; 3 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and times (default 0)")
    args = parser.parse_args(arguments)
    kills = 3 if args.quick else args.kills
    hits, survived, rng = [], 0, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("shapes", "colours"):
            prepare = command("prepare.py", f"embedded:{name}", "--out", folder / "data")
            subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
        (folder / "soak.yaml").write_text(CONFIG.format(inner_steps=INNER_STEPS, data=folder / "data"))
        while len(hits) < kills:
            new, equal = soak(folder / str(len(hits)), rng, min(KILLS_A_RUN, kills - len(hits)))
            hits, survived = hits + new, survived + equal * len(new)
            print(f"{len(hits)} kills, {survived} survived", flush=True)
    rows = []
    for victim in (*VICTIMS, "all"):
        of_victim = [seconds for name, seconds in hits if victim in (name, "all")]
        restarts = [seconds for seconds in of_victim if seconds is not None]
        times = (
            {"median": statistics.median(restarts), "worst": max(restarts)}
            if restarts
            else {"median": "-", "worst": "-"}
        )
        rows.append({"killed": victim, "kills": len(of_victim)} | {f"{key} restart, s": s for key, s in times.items()})
    rows[-1]["killed"] = f"all: {survived} survived"
    results = {
        "kills": kills,
        "survived": survived,
        "worst_restart_seconds": max(s or 0 for _, s in hits),
        "hits": hits,
    }
    report.publish("soak", results, rows, args, world_size=2)
    return 0 if survived == kills else 1


if __name__ == "__main__":
    sys.exit(main())
