"""Kills ranks and torchrun, at random or at chosen moments, and compares phi with an uninterrupted run's."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks import report
from benchmarks.runs import ROOT, command
from dist_cts.run import folder as run_folder

EPILOG = """\
A run of two small tasks on two ranks, by `torchrun --max-restarts`, gets SIGKILL again and again. After ten kills the
run is completed. A kill is survived if phi is then bit-identical to that of an uninterrupted run. Rounds alternate:

random  at seeded random times, one in five during start-up; the victim is a rank, or torchrun itself, which is then
        started again
aimed   a rank at one of its file operations while it starts, resumes, publishes or prunes a checkpoint, or exports phi

A restart is the time from a kill to the first step logged after it. Finished rounds are kept in --state: the same
command continues after an interruption.

  python benchmarks/soak.py --kills 100
"""
VICTIMS, KILLS_A_ROUND, INNER_STEPS = ("rank 0", "rank 1", "torchrun"), 10, 10
HANG = 600.0  # seconds without a step after which a run counts as lost; generous, for a machine that has other work
MOMENTS = {  # where an aimed kill waits (a pattern of paths; empty: imports), range of operations after it, ranks
    "start-up": ("", (1, 1500), (0, 1)),
    "resume": (r"checkpoints/step-\d+/", (0, 4), (0, 1)),
    "publish": (r"checkpoints/step-\d+\.\w+\.tmp", (0, 12), (0, 1)),
    "prune": (r"checkpoints/step-\d+ ", (0, 8), (0,)),
    "export": (r"snapshots/phi_\d+\.safetensors\.", (0, 4), (0,)),
}
CONFIG = """\
tasks: [shapes, colours]
inner_steps: {inner_steps}
batch_size: 4
meta_lr: 0.5
reduction: ordered
log_every: 5
snapshot_every: 25
device: cpu
model: {{name: tiny}}
data: {{root: {data}}}
checkpoint: {{every_steps: 25}}
"""
Hit = tuple[str, float | None]  # what was killed, and the seconds to the next logged step; None: killed again before


class Run:
    """A run that is being killed: its torchrun process, and the log of all its starts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.killed_at, self._seen, self.aim = folder, time.monotonic(), 0, folder / "aim.json"
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
        while not self._has_stepped():
            self._look_at_the_clock()
        return time.monotonic() - self.killed_at

    def kill_at(self, rank: int, pattern: str, after: int) -> bool:
        """Has a rank killed at a file operation (see aimed_kill/); False if the run passed that moment unharmed."""
        at_start = pattern == "" or "step-\\d+/" in pattern
        self.aim.write_text(json.dumps({"rank": rank, "pattern": pattern, "after": after}))
        self.killed_at = time.monotonic()
        if at_start:  # such a moment comes only after another kill
            self.kill(VICTIMS[1 - rank])
        while self.aim.exists():
            self._look_at_the_clock()
            if at_start and self._has_stepped():
                self.aim.unlink(missing_ok=True)
                return False
        self.killed_at, self._seen = time.monotonic(), len(self.log())
        return True

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

    def _has_stepped(self) -> bool:
        return re.search(r"gradient evaluations(.|\n)*\nstep \d+/", self.log()[self._seen :]) is not None

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
    hook = os.pathsep.join(filter(None, (f"{ROOT}/benchmarks/aimed_kill", os.environ.get("PYTHONPATH"))))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": hook, "AIM": f"{folder}/aim.json"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command("train.py", *keys, **torchrun), cwd=ROOT, stdout=log, stderr=log, env=env)


def at_random(run: Run, rng: random.Random, kills: int) -> Iterator[Hit]:
    """Kills a rank or torchrun at random times."""
    for number in range(kills):
        victim = rng.choice(VICTIMS)
        run.kill(victim)
        if number + 1 < kills and rng.random() < 0.2:
            yield victim, None
            time.sleep(rng.uniform(0, 5))
        else:
            yield victim, run.await_step()
            time.sleep(rng.uniform(0, 1))


def aimed(run: Run, rng: random.Random, kills: int) -> Iterator[Hit]:
    """Kills a rank at the chosen moments; the kill that leads to a start counts as well."""
    done = 0
    while done < kills:
        moment = rng.choice(list(MOMENTS))
        pattern, operations, ranks = MOMENTS[moment]
        rank = rng.choice(ranks)
        killed = run.kill_at(rank, pattern, rng.randint(*operations))
        if moment in ("start-up", "resume"):
            done += 1
            yield VICTIMS[1 - rank], None
        seconds = run.await_step()
        if killed:
            done += 1
            yield moment, seconds


def soak(folder: Path, seed: str, kills: int, how: Callable[[Run, random.Random, int], Iterator[Hit]]) -> dict:
    """A round: what was killed, and whether phi is then bit-identical to an uninterrupted run's."""
    run = Run(folder)
    run.await_step()
    hits = list(how(run, random.Random(seed), kills))
    episodes = run.finish()
    if launch(folder, episodes, "uninterrupted").wait():
        raise RuntimeError(run.log()[-5000:])
    phis = [safetensors.torch.load_file(folder / name / "phi.safetensors") for name in ("run", "uninterrupted")]
    equal = all(torch.equal(phis[0][name], phis[1][name]) for name in phis[0].keys() | phis[1].keys())
    leftovers = [path.name for path in (folder / "run").rglob("*.tmp*")]
    return {"seed": seed, "hits": hits, "equal": equal, "leftovers": leftovers}


def rounds(state: Path, seed: int, kills: int) -> Iterator[dict]:
    """All rounds, finished ones from `state`; a new one is appended to it."""
    finished = {record["seed"]: record for record in map(json.loads, state.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("shapes", "colours"):
            prepare = command("prepare.py", f"embedded:{name}", "--out", folder / "data")
            subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
        (folder / "soak.yaml").write_text(CONFIG.format(inner_steps=INNER_STEPS, data=folder / "data"))
        for number in itertools.count():
            name = f"{seed}-{number}"
            if name not in finished:
                finished[name] = soak(folder / name, name, min(KILLS_A_ROUND, kills), (at_random, aimed)[number % 2])
                shutil.rmtree(folder / name)
                with state.open("a") as file:
                    file.write(json.dumps(finished[name]) + "\n")
            yield finished[name]


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default 100; 2 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and times (default 0)")
    parser.add_argument("--state", type=Path, help="file of finished rounds (default runs/soak.jsonl)")
    args = parser.parse_args(arguments)
    kills = 2 if args.quick else args.kills
    with tempfile.TemporaryDirectory() as temporary:
        state = Path(temporary, "rounds") if args.quick else args.state or ROOT / "runs" / "soak.jsonl"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.touch()
        hits, survived, leftovers = [], 0, 0
        for record in rounds(state, args.seed, kills // 2 if args.quick else kills):
            hits, leftovers = hits + record["hits"], leftovers + len(record["leftovers"])
            survived += record["equal"] * len(record["hits"])
            print(f"{len(hits)} kills, {survived} survived", flush=True)
            if len(hits) >= kills:
                break
    rows = []
    for victim in (*VICTIMS, *MOMENTS, "all"):
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
        "kills": len(hits),
        "leftovers": leftovers,
        "survived": survived,
        "worst_restart_seconds": max(s or 0 for _, s in hits),
        "hits": hits,
    }
    report.publish("soak", results, rows, args, world_size=2)
    return 0 if survived == len(hits) else 1


if __name__ == "__main__":
    sys.exit(main())
