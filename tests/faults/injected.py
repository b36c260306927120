"""Injects the fault described in FAULT into this process if the rank matches; once, even after restarts.

    {"rank": 1, "step": 17, "act": "kill", "once": PATH, "at": "gradient", "argument": null}

`run`: only once that folder has a checkpoint. `at`: in the gradient of that step, in the test of theta after it, in the
writing of a checkpoint's n-th file, in the loader's thread, before the n-th call of a function, or before the n-th
change of a path that contains `below`.
"""

import ctypes
import json
import os
import pkgutil
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from dist_cts import atomic
from dist_cts.data import source
from dist_cts.distributed import peer_failure
from dist_cts.learner import TaskLearner
from dist_cts.run.hooks import Hooks

fault = json.loads(os.environ["FAULT"])
peer_failure.POLL_SECONDS, peer_failure.ANSWER_SECONDS = 0.1, 1.5


def flip_bits(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 255]))


def fill(path: str) -> None:
    """Until nothing fits on the disk any more; then takes what others free there, until this process ends."""
    ballast = open(path, "ab", buffering=0)  # noqa: SIM115

    def eat(patience: float) -> None:
        while True:
            try:
                ballast.write(bytes(4096))
            except OSError:
                if not patience:
                    return
                time.sleep(patience)

    eat(0)
    threading.Thread(target=eat, args=(0.002,), daemon=True).start()


def exceed_memory() -> None:
    """Allocates more than the process may have."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
    torch.empty(1 << 30)


def fill_control_group(group: str) -> None:
    """Allocates more than the control group may have, so that the kernel kills this process."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    torch.ones(1 << 28)


def kill_agent() -> None:
    """Returns once the agent is gone."""
    agent = os.getppid()
    os.kill(agent, signal.SIGKILL)
    while os.getppid() == agent:
        time.sleep(0.01)


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


def fail(error: str) -> None:
    raise {"value": ValueError("no such sample"), "type": TypeError("an operand\nof the wrong type")}[error]


ACTS = {
    "kill": lambda learner, _: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda learner, _: ctypes.string_at(0),
    "stop": lambda learner, _: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda learner, _: os.kill(os.getpid(), signal.SIGTERM),
    "exit": lambda learner, _: os._exit(3),
    "kill the agent": lambda learner, _: kill_agent(),
    "wait": lambda learner, path: wait_for(path),
    "sleep": lambda learner, seconds: time.sleep(seconds),
    "inf": lambda learner, _: learner.flat.grad[:1].fill_(float("inf")),
    "nan": lambda learner, _: learner.batch[0].fill_(float("nan")),
    "memory": lambda learner, _: exceed_memory(),
    "fill a control group": lambda learner, group: fill_control_group(group),
    "fail": lambda learner, error: fail(error),
    "fill": lambda learner, path: fill(path),
    "truncate": lambda learner, path: os.truncate(path, 5000),
    "flip": lambda learner, path: flip_bits(path),
}


def act(learner: TaskLearner | None = None) -> None:
    once, patience = Path(fault["once"]), 300
    while fault.get("run") and not any(Path(fault["run"], "checkpoints").glob("step-????????")) and patience:
        patience -= 1
        time.sleep(0.1)
    if not once.exists():
        once.touch()
        ACTS[fault["act"]](learner, fault.get("argument"))


def at_gradient() -> None:
    compute_gradient = TaskLearner.compute_gradient

    def compute(learner, batch):
        if due := learner.batches.step == fault["step"] and fault["act"] != "inf":
            act(learner)
        result = compute_gradient(learner, batch)
        if learner.batches.step == fault["step"] and not due:
            act(learner)
        return result

    TaskLearner.compute_gradient = compute


def at_test() -> None:
    evaluate = Hooks.evaluate

    def evaluated(hooks):
        if hooks.state.progress.step == fault["step"]:
            act()
        evaluate(hooks)

    Hooks.evaluate = evaluated


def at_file() -> None:
    write_file, files = atomic.write_file, []

    def written(path, data):
        files.append(path)
        if len(files) == fault["step"]:
            path.write_bytes(data[: len(data) // 2])
            act()
        write_file(path, data)

    atomic.write_file = written


def at_loader() -> None:
    """The loader's thread raises when it decodes the batch of that step."""
    classes = source._ffcv_classes

    def broken():
        loader, iterator = classes()

        class Broken(iterator):
            def run_pipeline(self, batch, *rest):
                if batch == fault["step"]:
                    raise OSError("disk gone")
                return super().run_pipeline(batch, *rest)

        return loader, Broken

    source._ffcv_classes = broken


def at_call() -> None:
    """Before the n-th call of the function whose dotted name is `function`."""
    owner, _, name = fault["function"].rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), []
    function = getattr(owner, name)

    def called(*arguments, **options):
        calls.append(arguments)
        if len(calls) == fault["step"]:
            act()
        return function(*arguments, **options)

    setattr(owner, name, called)


def at_change() -> None:
    changes, seen = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}, []

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in changes) and any(fault["below"] in str(path) for path in arguments[:2]):
            seen.append(event)
            if len(seen) == fault["step"]:
                act()

    sys.addaudithook(hook)


ENTRIES = {
    "gradient": at_gradient,
    "test": at_test,
    "file": at_file,
    "loader": at_loader,
    "call": at_call,
    "change": at_change,
}
if int(os.environ.get("RANK", 0)) == fault["rank"]:
    ENTRIES[fault.get("at", "gradient")]()
