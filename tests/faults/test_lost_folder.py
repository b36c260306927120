"""A run folder that is deleted, moved, taken or not writable in mid-run."""

import os
import re
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
def train_while(start, config, fault, until, tmp_path):
    """train_while(change, *keys): calls change(run folder) while rank 1 waits in a step; exit codes and stderr."""

    def no_checkpoint_is_being_written():
        time.sleep(1)
        return not any(tmp_path.glob("**/checkpoints/*.tmp"))

    def train_while(change, *keys, run=tmp_path / "run"):
        environment = fault("wait", argument=str(tmp_path / "changed"), run=str(run))
        command = start("train.py", "--config", config, *keys, forked=2, environment=environment)
        until((tmp_path / "once").exists)
        until(no_checkpoint_is_being_written)
        change(run)
        (tmp_path / "changed").touch()
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
    assert 1 <= err.count("warning: metrics records lost: Read-only file system") <= 2, err
    assert f"step {STEPS}/{STEPS} " in err
    (line,) = errors(err)
    assert f"cannot write to {run} (Read-only file system)" in line
    assert train()[0] == [0, 0]
    assert_equal(phi(run), uninterrupted)


@pytest.fixture
def ext4(tmp_path):
    """A folder on an ext4 of its own that turns read-only on an error; skips the test where it cannot be mounted."""
    image, folder = tmp_path / "ext4", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    for command in (["mkfs.ext4", "-q", image], ["mount", "-o", "loop,errors=remount-ro", image, folder]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{command[0]} is not possible here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@full
def test_a_disk_that_the_kernel_turns_read_only_loses_nothing(train_while, train, ext4, tmp_path, uninterrupted):
    """As after an I/O error, with files open for writing. The same command resumes where the disk can be written."""
    run = ext4 / "run"

    def abort(_):
        subprocess.run(["mount", "-o", "remount,abort", ext4], capture_output=True)
        with pytest.raises(OSError, match=r"Read-only|Input/output"):
            (ext4 / "probe").mkdir()

    codes, err = train_while(abort, f"run_dir={run}", run=run)
    assert codes == [1, 1], err
    assert "checkpoint failed: " in err
    assert f"step {STEPS}/{STEPS} " in err
    (line,) = errors(err)
    assert f"cannot write to {run} (" in line
    shutil.copytree(run, tmp_path / "run")
    codes, err = train()
    assert codes == [0, 0], err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@full
def test_a_run_that_cannot_save_for_too_long_gives_up(train_while, train, tmp_path, uninterrupted):
    checkpoints = tmp_path / "run" / "checkpoints"

    def block(run):
        shutil.rmtree(checkpoints)
        checkpoints.touch()

    codes, err = train_while(block, "checkpoint={every_steps: 4, give_up_minutes: 0.05}", "episodes=1000000")
    assert codes == [1, 1], err
    (line,) = errors(err)
    assert re.search(r"no checkpoint could be saved for \d+ minutes \(File exists\)", line)
    assert line.endswith(f"no valid checkpoint yet. Make {checkpoints} writable, then run the same command to resume")
    checkpoints.unlink()
    assert train()[0] == [0, 0]
    assert_equal(phi(tmp_path / "run"), uninterrupted)
