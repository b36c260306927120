"""A run folder that is deleted, moved, taken or not writable in mid-run."""

import os
import shutil
import subprocess
import time

import pytest

from dist_cts.run.folder import claim
from tests.helpers.commands import assert_equal, phi, records
from tests.helpers.small_run import LIMIT, STEPS, errors

full = pytest.mark.faults
pytestmark = pytest.mark.timeout(3 * LIMIT)


@pytest.fixture(scope="module")
def delay():
    return 0


@pytest.fixture
def train_while(start, config, fault, tmp_path):
    """train_while(change, *keys): calls change(run folder) while rank 1 sleeps in a step; exit codes and stderr."""

    def train_while(change, *keys):
        command = start("train.py", "--config", config, *keys, forked=2, environment=fault("sleep", argument=3))
        deadline = time.monotonic() + LIMIT
        while not (tmp_path / "once").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # rank 0 finishes writing a checkpoint
        change(tmp_path / "run")
        code, _, err = command.finish(LIMIT)
        assert "Traceback" not in err, err
        return code, err

    return train_while


def test_a_folder_that_is_deleted_in_mid_run_is_created_again(train_while, tmp_path, uninterrupted):
    run = tmp_path / "run"
    codes, err = train_while(shutil.rmtree)
    assert codes == [0, 0], err
    assert err.count("warning: ") == 1, err
    assert f"warning: {run} or its lock was deleted or moved during the run; created it again" in err
    assert_equal(phi(run), uninterrupted)
    files = {path.name for path in run.iterdir()}
    assert files >= {
        *(".lock", "config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"),
        "phi.safetensors",
    }
    assert (run / "checkpoints" / f"step-{STEPS:08d}").exists()
    assert records(run)[-1]["step"] == STEPS
    assert len(list((run / "tensorboard").iterdir())) == 1


@full
def test_a_folder_that_another_run_has_taken_ends_the_run_and_is_left_alone(train_while, tmp_path):
    taken = []

    def take(run):
        run.rename(f"{run}.moved")
        taken.append(claim(run))

    codes, err = train_while(take)
    taken[0].close()
    assert codes == [1, 1], err
    (line,) = errors(err)
    assert line == (
        f"error: {tmp_path / 'run'} or its lock was deleted or moved during the run; {tmp_path / 'run'} is in use by "
        f"another run (process {os.getpid()} on {os.uname().nodename}): stop it, or choose another run_dir"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@full
def test_a_folder_that_becomes_read_only_is_a_warning_per_cause(train_while, train, tmp_path, uninterrupted):
    run = tmp_path / "run"

    def cover(run):
        command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")

    try:
        codes, err = train_while(cover, "checkpoint.every_steps=1")
    finally:
        subprocess.run(["umount", str(run)], check=True)
    assert codes == [1, 1], err  # phi cannot be written
    assert 1 <= err.count("checkpoint failed: Read-only file system") <= 2, err  # the 1st and 10th
    assert err.count("warning: metrics records lost: Read-only file system") == 1, err
    assert f"step {STEPS}/{STEPS} " in err
    (line,) = errors(err)
    assert f"cannot write to {run} (Read-only file system)" in line
    assert train()[0] == [0, 0]
    assert_equal(phi(run), uninterrupted)


@full
def test_a_run_that_cannot_save_for_too_long_gives_up(train_while, train, tmp_path, uninterrupted):
    checkpoints = tmp_path / "run" / "checkpoints"

    def block(run):
        shutil.rmtree(checkpoints)
        checkpoints.touch()

    codes, err = train_while(block, "checkpoint={every_steps: 4, give_up_minutes: 0.05}", "episodes=1000000")
    assert codes == [1, 1], err
    (line,) = errors(err)
    assert "no checkpoint could be saved for 0 minutes (File exists)" in line
    assert line.endswith(f"no valid checkpoint yet. Make {checkpoints} writable, then run the same command to resume")
    checkpoints.unlink()
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)
