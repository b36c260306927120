"""The small run, uninterrupted and with faults, by forked ranks or by torchrun."""

import json
import random
import time

import pytest

from tests.helpers.commands import Command, phi
from tests.helpers.small_run import LIMIT, SAVE, STEPS, write_config


@pytest.fixture(scope="module", params=[0, pytest.param(2, marks=pytest.mark.faults)], ids=["now", "2 steps late"])
def delay(request):
    return request.param


@pytest.fixture
def config(tmp_path, tasks, delay):
    return write_config(tmp_path / "small.yaml", tasks, tmp_path / "run", delay)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tasks, delay):
    """phi of an uninterrupted run; with ordered reduction one process is bit-identical to two."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = Command("train.py", "--config", write_config(folder / "small.yaml", tasks, folder, delay), folder=folder)
    code, _, err = command.finish()
    assert code == 0, err
    return phi(folder)


@pytest.fixture
def fault(tmp_path):
    """fault(act, ...): the environment in which a rank has that fault, at a random step after the first checkpoint."""

    def fault(act, rank=1, **details):
        step = random.Random(f"{act} {rank} {details}").randint(SAVE + 2, STEPS - 3)
        where = {"once": f"{tmp_path}/once", "run": f"{tmp_path}/run"}
        return {"FAULT": json.dumps({"act": act, "rank": rank, "step": step, **where, **details})}

    return fault


@pytest.fixture
def until():
    """until(condition, *arguments): waits for the condition and returns its value; fails after LIMIT seconds."""

    def until(condition, *arguments):
        deadline = time.monotonic() + LIMIT
        while not (value := condition(*arguments)):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)
        return value

    return until


@pytest.fixture
def train(start, config):
    """train(*keys, **options): a training by two forked ranks, to its end; exit codes and stderr."""

    def train(*keys, forked=2, **options):
        code, _, err = start("train.py", "--config", config, *keys, forked=forked, **options).finish(LIMIT)
        return code, err

    return train


@pytest.fixture
def torchrun(start, config):
    """torchrun(*keys, options, ranks): the same training by torchrun."""
    return lambda *keys, **options: start("train.py", "--config", config, *keys, **{"ranks": 2, **options})
