"""The run folder: its lock, a folder that is deleted or taken in mid-run, and files of whole records."""

import errno
import fcntl
import json
import os
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_cts import TrainConfig, train
from dist_cts.errors import RunError
from dist_cts.run import folder as run_folder
from dist_cts.run.folder import RunFolder, claim
from dist_cts.run.record_file import EventFile, RecordFile


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(run_folder, "log_rank0", lines.append)
    return lines


LOSSES = {
    "deleted": shutil.rmtree,
    "moved": lambda path: path.rename(f"{path}.moved"),
    "without its lock": lambda path: (path / ".lock").unlink(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_folder_that_is_deleted_or_moved_is_created_again_with_its_lock_and_description(tmp_path, log, loss):
    run = RunFolder(tmp_path / "run", owner=True)
    run.describe = (tmp_path / "run" / "config.yaml").touch
    run.restore()
    assert not log
    LOSSES[loss](run.path)
    for _ in range(2):
        run.restore()
        assert len(log) == 1
    assert (run.path / "config.yaml").exists()
    with pytest.raises(ValueError, match="in use by another run"):
        claim(run.path)
    run.close()
    claim(run.path).close()


def test_a_folder_that_another_run_has_taken_is_left_alone(tmp_path, log):
    run = RunFolder(tmp_path / "run", owner=True)
    run.describe = lambda: pytest.fail("wrote into the other run's folder")
    run.path.rename(tmp_path / "moved")
    taken = f"{run.path} or its lock was deleted or moved .* in use by another run"
    with claim(run.path), pytest.raises(RunError, match=taken):
        run.restore()


def test_a_description_that_could_not_be_written_is_written_the_next_time(tmp_path, log):
    run, faults = RunFolder(tmp_path / "run", owner=True), [OSError("disk full")]
    shutil.rmtree(run.path)

    def describe():
        if faults:
            raise faults.pop()
        (run.path / "config.yaml").touch()

    run.describe = describe
    with pytest.raises(OSError, match="disk full"):
        run.restore()
    run.restore()
    assert (run.path / "config.yaml").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def no_locks(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    claim(tmp_path / "run").close()
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'run'}: its file system has no file locks ({os.strerror(number)}); "
        "do not start a second run in this folder\n"
    )


def test_a_lock_is_taken_on_the_folder_that_is_there_now(tmp_path, monkeypatch):
    """Another process renames the folder, as --fresh does, after this one has opened its lock."""
    path, flock = tmp_path / "run", fcntl.flock

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.rename(tmp_path / "run.1")
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with claim(path), pytest.raises(ValueError, match="in use"):
        claim(path)
    claim(tmp_path / "run.1").close()


def test_a_record_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(small_disk):
    disk = small_disk(100)
    file, ballast, record = (
        RecordFile(disk / "metrics.jsonl"),
        disk / "ballast",
        json.dumps("x" * 5000).encode() + b"\n",
    )
    file.append(record)
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(1 << 20))
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            file.append(record)
    ballast.unlink()
    file.append(record)
    file.close()
    assert (disk / "metrics.jsonl").read_bytes() == 2 * record


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_curves_of_a_run_that_resumed_and_whose_files_were_deleted(tmp_path):
    folder = tmp_path / "tensorboard"
    file = EventFile(folder, first_step=1)
    for step in (10, 20, 30):
        file.add_scalars({"loss/a": step / 8, "loss/b": 0.5}, step)
    file.close()
    resumed = EventFile(folder, first_step=21)
    resumed.add_scalars({"loss/a": 9.0}, 30)
    assert scalars(folder) == {"loss/a": [(10, 1.25), (20, 2.5), (30, 9.0)], "loss/b": [(10, 0.5), (20, 0.5)]}
    shutil.rmtree(folder)
    resumed.add_scalars({"loss/a": 4.0}, 40)
    assert scalars(folder) == {"loss/a": [(40, 4.0)]}


def test_a_failed_run_releases_its_folder_at_once(tasks, tmp_path):
    """Even while its error, and with it what its frames hold, is alive."""
    config = TrainConfig(tasks=["a"], model={"name": "tiny"}, data={"root": tasks}, run_dir=tmp_path / "run")
    config = config.model_copy(update={"init": str(tmp_path / "missing.safetensors")})
    with pytest.raises(FileNotFoundError) as failed:
        train(config)
    claim(tmp_path / "run").close()
    assert failed.value.__traceback__
