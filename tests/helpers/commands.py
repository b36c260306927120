"""Runs the commands of launch/ as a user does, and reads their output."""

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Faults come into a process through tests/faults/injected.py, where it finds FAULT in its environment.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

GRACE = 100  # seconds between the failure of one forked rank and the end of the others, unless they are stopped


class Command:
    """A running command of launch/.

    By torchrun on `ranks`, with `options`, here or on a `host` of benchmarks/namespaces.py; otherwise as one process
    or as `forked` ranks with the environment of a torchrun that does nothing. Forked processes have torch loaded: they
    start in milliseconds.
    """

    def __init__(
        self,
        script,
        *arguments,
        ranks=None,
        forked=None,
        options=("--standalone",),
        host=None,
        environment=None,
        folder,
    ):
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.out.touch(), self.err.touch()
        self.forked = forked or (ranks is None)
        arguments = [str(ROOT / "launch" / script), *map(str, arguments)]
        environment = {**ENVIRONMENT, **(environment or {})}
        if "FAULT" in environment:
            environment["PYTHONPATH"] = f"{ROOT / 'tests' / 'faults'}:{environment.get('PYTHONPATH', '')}"
        if not self.forked:
            command = [*TORCHRUN, *options, f"--nproc_per_node={ranks}", *arguments]
            command = host.command(*command) if host else command
            with self.out.open("w") as out, self.err.open("w") as err:
                self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
            return
        assignment = [{}]
        if forked:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            size = {"WORLD_SIZE": forked, "LOCAL_WORLD_SIZE": forked}
            assignment = [{"RANK": rank, "LOCAL_RANK": rank, **size, **address} for rank in range(forked)]
        context, self.processes = multiprocessing.get_context("forkserver"), []
        for seat in assignment:
            variables = environment | {key: str(value) for key, value in seat.items()}
            run = (arguments, variables, self.out, self.err)
            self.processes.append(context.Process(target=_run_script, args=run))
            self.processes[-1].start()
        self.process = self.processes[0]

    def kill(self):
        for process in self.processes if self.forked else [self.process]:
            process.kill()

    def running(self):
        if self.forked:
            return any(process.is_alive() for process in self.processes)
        return self.process.poll() is None

    def signal(self, number):
        os.kill(self.process.pid, number)

    def stopped(self):
        """Whether every forked rank that is left is stopped, as by SIGSTOP."""
        states = []
        for process in self.processes:
            with suppress(FileNotFoundError):
                states.append(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
        return set(states) == {"T"}

    def finish(self, timeout=250):
        """Exit code (of forked ranks a list), stdout and stderr."""
        deadline, failed = time.monotonic() + timeout, False
        while self.running() and time.monotonic() < deadline and not (failed and self.stopped()):
            time.sleep(0.02)
            if self.forked and not failed and any(process.exitcode for process in self.processes):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        if hung := self.running():
            self.kill()
            hung = not failed  # like torchrun, kill what is left after a failure, such as a stopped rank
        code = None if self.forked else self.process.wait()
        if self.forked:
            for process in self.processes:
                process.join()
            codes = [process.exitcode for process in self.processes]
            code = codes if len(codes) > 1 else codes[0]
        assert not hung, f"no end after {timeout} s: {self.err.read_text()}"
        return code, self.out.read_text(), self.err.read_text()


def _run_script(arguments, environment, out, err):
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)  # as OMP_NUM_THREADS would have, had torch not been loaded; sums depend on it
    if "FAULT" in environment:
        sys.path.insert(0, str(ROOT / "tests" / "faults"))
        import injected  # noqa: F401
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def own_lines(err):
    """The program's own lines, without torchrun's report."""
    return [line for line in err.splitlines() if re.match(r"(error:|step |done|stopped|going on)", line)]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def phi(folder):
    return safetensors.torch.load_file(folder / "phi.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
