"""Fault injection into real runs at random steps: they exit in time with a one-line error and lose nothing.

After every fault the same command resumes, and phi is bit-identical to that of an uninterrupted run. Ranks are
forked where torchrun itself is not tested. `make faults` runs all of them, `make test` those without the mark.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dist_cts.run.folder import claim
from tests.checkpoint.test_checkpoint import DAMAGES
from tests.helpers.commands import assert_equal, phi
from tests.helpers.small_run import LIMIT, RESTARTS, SAVE, SOON, STEPS, errors

full = pytest.mark.faults
pytestmark = pytest.mark.timeout(3 * LIMIT)


@pytest.mark.parametrize(
    ("act", "rank"),
    [
        ("kill", 1),
        *(
            pytest.param(*case, marks=full)
            for case in [("kill", 0), ("segv", 1), ("exit", 0), ("stop", 1), ("stop", 0)]
        ),
    ],
)
def test_a_lost_rank_is_named_by_one_of_the_others_and_nothing_is_lost(
    train, fault, tmp_path, uninterrupted, delay, act, rank
):
    environment = fault(act, rank)
    step = json.loads(environment["FAULT"])["step"]
    codes, err = train(SOON, environment=environment)
    assert codes[1 - rank] == 1, err
    (line,) = errors(err)
    assert line in [  # the others notice it when they wait for it
        f"error: rank {rank} (task {'ab'[rank]}), in step {noticed}, died or does not respond; "
        "run the same command to resume from the latest checkpoint"
        for noticed in range(step, step + delay + 1)
    ]
    codes, err = train()
    assert codes == [0, 0], err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
@pytest.mark.parametrize(("rank", "file"), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3)])
def test_a_rank_killed_in_the_middle_of_any_file_of_a_checkpoint_loses_nothing(
    train, fault, tmp_path, uninterrupted, rank, file
):
    codes, err = train(environment=fault("kill", rank, at="file", step=file, run=None))
    assert codes[rank] == -signal.SIGKILL, err
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
def test_a_rank_killed_while_the_thetas_are_tested_loses_nothing(train, fault, tmp_path, uninterrupted):
    codes, err = train("eval_every=5", environment=fault("kill", 1, at="test", step=15))
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1 (task b), in step 15, died" in err
    assert train("eval_every=5")[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)


def test_a_stop_of_one_rank_stops_all_at_the_same_step(train, fault, tmp_path, uninterrupted):
    codes, err = train("checkpoint.every_steps=0", environment=fault("term", run=None))
    assert codes == [75, 75], err
    assert re.search(r"stopped at step \d+ with a checkpoint", err)
    codes, err = train("checkpoint.every_steps=0")
    assert codes == [0, 0]
    assert "resuming from" in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("act", [pytest.param("nan", marks=full), "inf"])
def test_what_is_not_finite_is_named_and_never_enters_phi(train, fault, tmp_path, uninterrupted, act):
    environment = fault(act)
    step = json.loads(environment["FAULT"])["step"]
    codes, err = train(environment=environment)
    assert codes == [1, 1]
    assert len(errors(err)) == 1, err
    assert f"error: step {step}: the update of task b is not finite; phi does not contain it" in err
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)
    (tmp_path / "once").unlink()
    codes, err = train("nonfinite=skip", f"run_dir={tmp_path / 'skip'}", environment=environment)
    assert codes == [0, 0], err
    assert err.count(f"step {step}: the update of task b is not finite; its learner restarts from phi") == 1, err
    assert all(tensor.isfinite().all() for tensor in phi(tmp_path / "skip").values())


START_UP = [
    ("dist_cts.distributed.process_group._attempt", 1),
    ("dist_cts.run.train.liveness_checked", 1),
    ("dist_cts.run.train.build_learners", 1),
    ("dist_cts.run.train.check_layouts", 1),
    ("dist_cts.run.train._run", 1),
    ("dist_cts.run.train.meta_train", 1),
]


@full
@pytest.mark.parametrize(
    ("rank", "function", "call", "keys"),
    [
        *((rank, *place, []) for rank in (0, 1) for place in START_UP),
        (0, "dist_cts.run.costs._measure", 1, ["placement=auto"]),
        (0, "pathlib.Path.rename", 1, ["--fresh"]),
        (0, "dist_cts.run.folder._claim", 2, ["--fresh"]),  # the old folder has its new name
    ],
)
def test_a_rank_killed_before_the_first_step_is_named_and_loses_nothing(
    train, fault, tmp_path, uninterrupted, rank, function, call, keys
):
    fresh = "--fresh" in keys
    if fresh:
        assert train("episodes=1", "seed=1")[0] == [0, 0]
        old = phi(tmp_path / "run")
    environment = fault("kill", rank, at="call", function=function, step=call, run=None)
    codes, err = train(*keys, SOON, environment=environment)
    assert codes[rank] == -signal.SIGKILL, err
    assert codes[1 - rank] == 1, err
    (line,) = errors(err)
    assert f"rank {rank}" in line
    codes, err = train(*keys)
    assert codes == [0, 0], err
    assert_equal(phi(tmp_path / "run"), uninterrupted)
    if fresh:
        assert_equal(phi(tmp_path / "run.1"), old)


@full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_for_three_seconds_delays_and_changes_nothing(
    start, config, fault, until, tmp_path, uninterrupted, rank
):
    command = start("train.py", "--config", config, forked=2, environment=fault("stop", rank))
    until((tmp_path / "once").exists)
    time.sleep(3)
    os.kill(command.processes[rank].pid, signal.SIGCONT)
    codes, _, err = command.finish(LIMIT)
    assert codes == [0, 0], err
    assert errors(err) == []
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
def test_a_rank_out_of_memory_says_so_and_loses_nothing(train, fault, tmp_path, uninterrupted):
    codes, err = train(SOON, environment=fault("memory"))
    assert codes == [1, 1], err
    assert "Traceback" not in err
    (line,) = errors(err)
    assert line.startswith("error: rank 1: out of memory")
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@pytest.fixture
def control_group():
    """A control group, of version 1 or 2, that may hold 64 MiB; skips the test where none can be created."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    folder = (root / "memory" if first else root) / f"dist-cts-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups can be created here ({error})")
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(64 << 20))
        yield folder
    except OSError as error:
        pytest.skip(f"control groups have no memory limit here ({error})")
    finally:
        folder.rmdir()


@full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_the_kernel_kills_for_its_memory_is_named_and_loses_nothing(
    train, fault, control_group, tmp_path, uninterrupted, rank
):
    environment = fault("fill a control group", rank, argument=str(control_group))
    codes, err = train(SOON, environment=environment)
    assert codes[rank] == -signal.SIGKILL, err
    assert codes[1 - rank] == 1
    (line,) = errors(err)
    assert f"rank {rank} (task {'ab'[rank]}), in step " in line
    assert "died or does not respond; run the same command to resume" in line
    codes, err = train()  # without the limit
    assert codes == [0, 0], err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
@pytest.mark.parametrize(("error", "rank"), [("value", 1), ("type", 1), ("value", 0)])
def test_an_error_of_one_rank_is_one_line_that_ends_all(train, fault, tmp_path, uninterrupted, error, rank):
    environment = fault("fail", rank, argument=error)
    step = json.loads(environment["FAULT"])["step"]
    codes, err = train(SOON, environment=environment)
    assert codes == [1, 1], err
    what = {"value": "no such sample", "type": "TypeError: an operand"}[error]
    line = f"error: rank {rank} (task {'ab'[rank]}), in step {step}, failed: {what}; run the same command to resume "
    assert errors(err) == [f"{line}from the latest checkpoint"]
    assert err.count("Traceback") == (error == "type")
    assert err.splitlines()[-1] == errors(err)[0]
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
def test_a_straggler_delays_and_changes_nothing(train, fault, tmp_path, uninterrupted):
    codes, err = train("checkpoint.every_steps=0", environment=fault("sleep", argument=5, run=None))
    assert codes == [0, 0], err
    assert errors(err) == []
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
@pytest.mark.parametrize("act", ["truncate", "flip", "loader"])
def test_a_loader_that_fails_or_whose_file_changes_is_named(train, fault, tmp_path, tasks, uninterrupted, act):
    shutil.copytree(tasks, tmp_path / "tasks")
    beton = tmp_path / "tasks" / "b" / "train.beton"
    content = beton.read_bytes()
    keys = ["data.cache=stream", f"data.root={beton.parent.parent}"]
    # The loader reads ahead: what changes in the last steps may have been read before.
    details = {"at": "loader"} if act == "loader" else {"argument": str(beton), "step": SAVE + 2}
    codes, err = train(*keys, environment=fault(act, **details))
    assert codes == [1, 1], err
    assert len(errors(err)) == 1, err
    cause = "OSError: disk gone" if act == "loader" else "ValueError: the file changed during the run"
    assert re.search(rf"error: rank 1: task b, step \d+: the loader thread of {beton} died \({cause}\)", err)
    if act != "loader":
        codes, err = train(*keys)
        assert codes == [2, 2]
        assert f"error: rank 1: {beton}: " in err
    beton.write_bytes(content)
    assert train(*keys)[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
@pytest.mark.parametrize("damage", ["half", "a bit in the middle"])
def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, uninterrupted, damage):
    for files in range(4):
        folder = tmp_path / f"run-{files}"
        keys = [f"run_dir={folder}", "checkpoint={every_steps: 4, keep: 9}"]
        assert train(*keys, f"episodes={STEPS // 10}")[0] == [0, 0]
        newest = max((folder / "checkpoints").glob("step-????????"))
        torn = sorted(newest.iterdir())[files]
        DAMAGES[damage](torn)
        codes, err = train(*keys)
        assert codes == [0, 0]
        assert f"skipping a damaged checkpoint: {torn}" in err
        assert_equal(phi(folder), uninterrupted)


@full
def test_a_full_disk_skips_writes_and_training_continues(train, fault, small_disk, tmp_path, uninterrupted):
    disk = small_disk(2000)
    run, ballast = disk / "run", disk / "ballast"
    codes, err = train(f"run_dir={run}", environment=fault("fill", 0, argument=str(ballast), run=str(run)))
    assert codes == [1, 1], err  # phi cannot be written either
    assert re.search(
        r"step \d+: checkpoint failed: .*No space left.*training continues, the latest valid one is at step \d+", err
    )
    assert f"step {STEPS}/{STEPS} " in err
    full_disk = f"cannot write to {run} (No space left on device); fix that, then run the same command to resume"
    assert [line.endswith(full_disk) for line in errors(err)] == [True], err
    codes, err = train(f"run_dir={run}")
    assert codes == [1, 1]
    assert err.count(full_disk) == 1, err
    ballast.unlink()
    assert train(f"run_dir={run}")[0] == [0, 0]
    assert_equal(phi(run), uninterrupted)


@full
def test_a_read_only_run_folder_is_one_line(train, small_disk, tmp_path):
    disk = small_disk(2000)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    codes, err = train(f"run_dir={disk / 'run'}")
    assert codes == [1, 1]
    assert len(errors(err)) == 1, err
    assert f"cannot write to {disk / 'run'} (Read-only file system)" in err


@full
def test_max_minutes_stops_a_run(train, tmp_path, uninterrupted):
    codes, err = train("max_minutes=0.01", "episodes=100000", "log_every=1000")
    assert codes == [75, 75]
    stopped = int(re.search(r"stopped at step (\d+) with a checkpoint", err)[1])
    codes, err = train(f"episodes={-(-stopped // 5) + 1}")
    assert codes == [0, 0]
    assert f"resuming from checkpoint at step {stopped}" in err
    whole = ["--config", tmp_path / "small.yaml", f"run_dir={tmp_path / 'whole'}"]
    assert train(f"episodes={-(-stopped // 5) + 1}", f"run_dir={tmp_path / 'whole'}")[0] == [0, 0], whole
    assert_equal(phi(tmp_path / "run"), phi(tmp_path / "whole"))


@full
def test_an_edited_config_is_refused_with_its_keys(train, tmp_path):
    assert train("episodes=1")[0] == [0, 0]
    codes, err = train("inner.lr=0.5", "loss_limit=5")
    assert codes == [2, 2]
    assert "inner.lr was 0.01, is 0.5" in err
    assert "loss_limit" not in err


def free(run):
    """Whether no rank holds the run's folder."""
    with suppress(ValueError):
        claim(run).close()
        return True


@pytest.fixture
def port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nodes(port):
    address = f"--rdzv-endpoint=127.0.0.1:{port}"
    return [*RESTARTS, "--nnodes=2", "--rdzv-backend=c10d", address, "--rdzv-id=test", "--local-addr=127.0.0.1"]


@full
@pytest.mark.parametrize("act", ["kill", "stop"])
def test_torchrun_restarts_a_run_that_lost_a_rank_bit_identically(torchrun, fault, tmp_path, uninterrupted, act):
    options = {"options": ["--standalone", *RESTARTS], "environment": fault(act)}
    code, _, err = torchrun("timeout_seconds=40", **options).finish(LIMIT)
    assert code == 0, err
    assert len(errors(err)) == 1
    assert "error: rank 1 (task b), in step " in err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
@pytest.mark.parametrize("rank", [0, 1])
def test_two_nodes_restart_when_either_loses_a_rank(torchrun, fault, tmp_path, uninterrupted, port, rank):
    options = {"ranks": 1, "environment": fault("kill", rank)}
    agents = [torchrun(options=nodes(port), **options) for _ in range(2)]
    ends = [agent.finish(LIMIT) for agent in agents]
    err = "".join(err for *_, err in ends)
    assert [code for code, *_ in ends] == [0, 0], err
    assert f"error: rank {rank} (task {'ab'[rank]}), in step " in err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
def test_without_torchrun_the_ranks_stop_with_a_checkpoint(torchrun, train, fault, until, tmp_path, uninterrupted):
    command = torchrun("checkpoint.every_steps=0", environment=fault("kill the agent", run=None))
    assert command.finish(LIMIT)[0] == -signal.SIGKILL
    until(lambda: "with a checkpoint" in command.err.read_text())
    until(free, tmp_path / "run")
    codes, err = train("checkpoint.every_steps=0")
    assert codes == [0, 0], err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR2", "SIGINT"])
@pytest.mark.parametrize("to", ["rank 1", "torchrun"])
def test_a_signal_stops_all_ranks_with_a_checkpoint_and_the_same_command_resumes(
    start, train, config, until, tmp_path, number, to
):
    keys = ["checkpoint.every_steps=0", "episodes=100000"]
    command = start("train.py", "--config", config, *keys, **({"ranks": 2} if to == "torchrun" else {"forked": 2}))
    until(lambda: "step 5/" in command.err.read_text())
    os.kill(command.process.pid if to == "torchrun" else command.processes[1].pid, getattr(signal, number))
    code, *_ = command.finish(LIMIT)
    # SIGUSR2 ends torchrun at once; its ranks stop on their own.
    stopped = until(lambda: re.search(r"stopped at step (\d+) with a checkpoint", command.err.read_text()))
    assert code == [75, 75] if to == "rank 1" else code != 0
    stopped = int(stopped[1])
    until(free, tmp_path / "run")
    keys[1] = f"episodes={stopped // 5 + 1}"
    codes, err = train(*keys)
    assert codes == [0, 0], err
    assert f"resuming from checkpoint at step {stopped}" in err
    assert train(*keys, f"run_dir={tmp_path / 'whole'}")[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), phi(tmp_path / "whole"))


@full
def test_ctrl_c_twice_ends_a_run_at_once(start, config, fault, until, tmp_path):
    """Rank 0 sleeps in a step, so that the first one cannot be handled."""
    command = start("train.py", "--config", config, forked=2, environment=fault("sleep", 0, argument=2 * LIMIT))
    until((tmp_path / "once").exists)
    for _ in range(4):  # two, unless they are handled so late that one more is needed for a second between them
        if command.processes[0].is_alive():
            os.kill(command.processes[0].pid, signal.SIGINT)
            time.sleep(1.2)
    codes, _, err = command.finish(LIMIT)
    assert codes[0] == 1
    assert "error: interrupted; run the same command to resume from the newest checkpoint" in err


@full
def test_torchrun_does_not_restart_what_was_asked_to_stop(torchrun, train, fault, tmp_path, uninterrupted):
    command = torchrun(options=["--standalone", *RESTARTS], environment=fault("term"))
    code, _, err = command.finish(LIMIT)
    assert code != 0
    assert len(re.findall(r"stopped at step \d+ with a checkpoint", err)) == 1, err
    assert "resuming from" not in err
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
def test_a_fresh_run_that_is_restarted_resumes(torchrun, train, fault, tmp_path, uninterrupted):
    assert train("episodes=1", "seed=1")[0] == [0, 0]
    environment = fault("kill", step=20)
    code, _, err = torchrun("--fresh", options=["--standalone", *RESTARTS], environment=environment).finish(LIMIT)
    assert code == 0, err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)
    assert {path.name for path in tmp_path.glob("run*")} == {"run", "run.1"}


@full
def test_a_rendezvous_port_that_is_taken_ends_torchrun_and_harms_nothing(torchrun, train, tmp_path, uninterrupted):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ["--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={taken.getsockname()[1]}"]
        code, _, err = torchrun(options=options).finish(LIMIT)
    assert code == 1
    assert re.search(r"EADDRINUSE|address already in use", err)
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)
