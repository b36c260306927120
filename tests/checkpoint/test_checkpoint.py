"""Checkpoints: bit-identical resume with damaged files, full or read-only disks and other placements."""

import copy
import errno
import os
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dist_cts import atomic, models
from dist_cts.algorithms.outer import OuterConfig
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.checkpoint import manager as checkpoint
from dist_cts.checkpoint import schedule
from dist_cts.checkpoint.files import MANIFEST, PHI, read_manifest, read_state, task_file, write_manifest
from dist_cts.checkpoint.manager import CheckpointManager
from dist_cts.checkpoint.phi import export_phi, load_phi
from dist_cts.checkpoint.schedule import CheckpointConfig
from dist_cts.checkpoint.settings import MAY_DIFFER, config_difference
from dist_cts.config import Config
from dist_cts.distributed.placement import data_group, place
from dist_cts.distributed.process_group import overlapping_groups, process_group
from dist_cts.distributed.reducer import MetaReducer, collectives
from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm
from dist_cts.errors import RunError
from dist_cts.flat import load_named
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.progress import Progress
from dist_cts.run.config import TrainConfig
from dist_cts.state import TrainState
from tests.helpers.batches import MemoryBatches

T, M, K, BETA = 4, 3, 5, 0.5
STEPS = M * K
TINY = ModelConfig(name="tiny")


class RunConfig(Config):
    """A stand-in for a run's config."""

    seed: int = 0
    episodes: int = M
    algorithm: str = "cts"
    reduction: str = "ordered"
    wire: str = "fp32"
    tasks: int = T
    delay: int = 0
    outer: OuterConfig = OuterConfig()
    inner: InnerConfig = InnerConfig(lr=0.05)
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=0)


def start(rank, world_size, folder, config=None, warn=print):
    """A run at step 0 with all objects new, as in a new process."""
    config = config or RunConfig()
    placement = place(config.tasks, world_size, rank)
    group = data_group(placement)
    learners = []
    for task in placement.local_tasks:
        model, head = models.build(TINY, 3 + task, "head", task)
        batches = MemoryBatches(task, classes=3 + task, data_rank=placement.data_rank, data_ranks=placement.data_ranks)
        model = convert_sync_batch_norm(model, group)
        learners.append(TaskLearner(f"task/{task}", model, head, batches, config.inner, data_group=group))
    layout = learners[0].flat.body_layout
    phi = torch.zeros(layout.numel)
    load_named(layout, phi, models.build(TINY, 1, "phi")[0].state_dict())
    checkpoints = CheckpointManager(folder / "checkpoints", config.checkpoint, placement, warn)
    state = TrainState(phi, layout, learners, Progress(K))
    return SimpleNamespace(
        config=config, state=state, **vars(state), checkpoints=checkpoints,
        reducer=MetaReducer(
            phi, learners, placement, config.reduction, wire=config.wire, delay=config.delay, reduced=state.reduced,
            groups=overlapping_groups(phi.device, (config.delay + 1) * collectives(config.wire), 60),
        ),
    )  # fmt: skip


def load(run):
    return run.checkpoints.load_newest(run.state, run.config)


def save(run, step=None, wait=False):
    run.reducer.drain()
    now = run.progress.step
    run.progress.step = now if step is None else step
    try:
        return run.checkpoints.save(run.state, run.config, wait)
    finally:
        run.progress.step = now


def train(run, until=STEPS, after_step=lambda step: None):
    def seen():
        after_step(run.progress.step)
        run.progress.stopping = run.progress.step == until

    run.progress.stopping = run.progress.step == until
    algorithm = ALGORITHMS[run.config.algorithm]
    meta_train(run.state, algorithm, run.reducer, beta=BETA, M=M, K=K, outer=run.config.outer, after_step=seen)


def tensors(run):
    """Every tensor of this rank's run, copied, and the next 100 batches."""
    state = {PHI: run.phi} | run.state.outer_state()
    for learner in run.learners:
        state |= {f"{learner.name}.{key}": value for key, value in learner.state_dict().items()}
        steps = range(learner.batches.step, learner.batches.step + 100)
        state[f"{learner.name}.next"] = torch.stack([learner.batches.batch_at(step)[0] for step in steps])
    return copy.deepcopy(state)


def differing(state, expected):
    assert len(state) > 1
    names = state.keys() | expected.keys()
    return [n for n in names if n not in state or n not in expected or not torch.equal(state[n], expected[n])]


@pytest.fixture
def alone():
    with process_group(torch.device("cpu"), 60):
        yield


@pytest.fixture
def on_ranks(run_ranks):
    """on_ranks(W, scenario, *args): scenario(rank, W, *args) on W ranks; a single one needs no process of its own."""

    def run(world_size, scenario, *args):
        if world_size > 1:
            return run_ranks(world_size, scenario, world_size, *args)
        with process_group(torch.device("cpu"), 60):
            return [scenario(0, 1, *args)]

    return run


# Steps after which the run is interrupted and resumed; several for more than one interruption.
PATTERNS = {
    "at the start": [0],
    "after the first step": [1],
    "mid-episode": [K + 2],
    "at the last step of an episode": [K],
    "at the first step of the next": [K + 1],
    "twice in a row": [K + 2, K + 3],
    "at once again": [K + 2, K + 2],
    "in three episodes": [2, K + 1, 2 * K],
    "at the end": [STEPS],
}


def all_patterns(rank, world_size, folder, config):
    """For each pattern the tensors that differ from the uninterrupted run's."""
    uninterrupted = start(rank, world_size, folder / "uninterrupted", config)
    train(uninterrupted)
    expected, faults = tensors(uninterrupted), {}
    for name, stops in PATTERNS.items():
        for stop in stops:
            run = start(rank, world_size, folder / name, config)
            load(run)
            train(run, until=stop)
            assert save(run, wait=True)
        run = start(rank, world_size, folder / name, config)
        assert load(run) == stops[-1]
        train(run)
        faults[name] = differing(tensors(run), expected)
    return faults


RUNS = {
    "momentum on 1 rank": (1, RunConfig()),
    "momentum on 2 ranks": (2, RunConfig()),
    "mean on 4 ranks": (4, RunConfig(reduction="mean")),
    "a data group of 2 ranks": (2, RunConfig(tasks=1)),
    "adam": (1, RunConfig(inner=InnerConfig(optimizer="adam", lr=0.005))),
    "reptile": (1, RunConfig(algorithm="reptile")),
    "2 steps late on 2 ranks, with momentum": (2, RunConfig(delay=2, outer=OuterConfig(momentum=0.5))),
    "4 steps late, mean on 4 ranks": (4, RunConfig(delay=4, reduction="mean")),
    "2 steps late in bf16, mean on 2 ranks": (2, RunConfig(delay=2, reduction="mean", wire="bf16")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(on_ranks, tmp_path, name):
    world_size, config = RUNS[name]
    for faults in on_ranks(world_size, all_patterns, tmp_path, config):
        assert faults == {pattern: [] for pattern in PATTERNS}


def one_part(rank, world_size, folder, until):
    run = start(rank, world_size, folder)
    load(run)
    train(run, until)
    assert save(run, wait=True)
    return tensors(run)


def test_with_ordered_reduction_a_run_changes_ranks_and_keeps_its_bits(on_ranks, tmp_path):
    def merged(world_size, folder, until):
        return {n: t for state in on_ranks(world_size, one_part, folder, until) for n, t in state.items()}

    expected = merged(1, tmp_path / "uninterrupted", STEPS)
    for world_size, until in ((4, 2), (1, K + 3), (2, 2 * K)):
        merged(world_size, tmp_path / "moved", until)
    assert differing(merged(1, tmp_path / "moved", STEPS), expected) == []


def test_training_continues_while_a_checkpoint_is_written(alone, tmp_path, monkeypatch):
    written = threading.Event()

    def slow(path, data):
        written.wait(30)
        write_file(path, data)

    write_file = atomic.write_file
    monkeypatch.setattr(atomic, "write_file", slow)
    warnings = []
    run = start(0, 1, tmp_path, warn=warnings.append)
    stalls = []

    def after_step(step):
        begin = time.perf_counter()
        if step in (K + 2, K + 4):
            assert save(run) == (step == K + 2)
            stalls.append(time.perf_counter() - begin)

    train(run, after_step=after_step)
    assert not run.checkpoints.steps()
    written.set()
    assert run.checkpoints.wait() == K + 2
    assert max(stalls) < 1
    (line,) = warnings
    assert line.startswith(f"step {K + 4}: checkpoint failed: an earlier one is still being written")
    resumed = start(0, 1, tmp_path)
    assert load(resumed) == K + 2
    train(resumed)
    assert differing(tensors(resumed), tensors(run)) == []


def truncate(keep):
    return lambda path: os.truncate(path, keep(path.stat().st_size))


def flip(where):
    def flip_a_bit(path):
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip_a_bit


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": truncate(lambda size: 0),
    "half": truncate(lambda size: size // 2),
    "all but a byte": truncate(lambda size: size - 1),
    "a byte too many": lambda path: path.write_bytes(path.read_bytes() + b"\n}"),
    "first bit": flip(0),
    "a bit in the middle": flip(0.5),
    "a late bit": flip(0.99),
    "a folder instead": lambda path: (path.unlink(), path.mkdir()),
    "another's": lambda path: shutil.copy(path.parent.parent / "step-00000002" / path.name, path),
}


SIZES = ("empty", "half", "all but a byte", "a byte too many")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run's folder with checkpoints of steps 2 and 4, and phi at both."""
    folder = tmp_path_factory.mktemp("run")
    phis = {}
    with process_group(torch.device("cpu"), 60):
        run = start(0, 1, folder)
        for step in (2, 4):
            train(run, until=step)
            save(run, wait=True)
            phis[step] = run.phi.clone()
    return folder, phis


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(alone, two_checkpoints, tmp_path, damage):
    folder, phis = two_checkpoints
    files = sorted(path.name for path in (folder / "checkpoints" / "step-00000004").iterdir())
    assert files == sorted([MANIFEST, PHI, *(task_file(f"task/{task}") for task in range(T))])
    for name in files:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        torn = tmp_path / "checkpoints" / "step-00000004" / name
        DAMAGES[damage](torn)
        warnings = []
        run = start(0, 1, tmp_path, warn=warnings.append)
        assert load(run) == 2, name
        assert torch.equal(run.phi, phis[2])
        assert len(warnings) == 1
        assert str(torn) in warnings[0]
        assert "\n" not in warnings[0]
        assert ("bytes, expected" in warnings[0]) == (damage in SIZES and name != MANIFEST)
        assert not torn.parent.exists()
        assert torn.parent.with_suffix(".damaged").exists()
        if name == files[0]:  # the run reaches step 4 again
            train(run, until=4)
            assert save(run, wait=True)
            assert load(start(0, 1, tmp_path)) == 4
        shutil.rmtree(tmp_path / "checkpoints")


def test_without_a_valid_checkpoint_the_run_does_not_silently_start_from_scratch(alone, two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no valid checkpoint among 2"):
        load(start(0, 1, tmp_path))
    assert len(list((tmp_path / "checkpoints").glob("step-????????"))) == 2


def test_without_a_checkpoint_there_is_nothing_to_load(alone, tmp_path):
    assert load(start(0, 1, tmp_path)) is None


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("files", range(1, T + 3))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_killed_at_any_file_leaves_the_checkpoint_before(alone, two_checkpoints, tmp_path, monkeypatch, files):
    shutil.copytree(two_checkpoints[0], tmp_path, dirs_exist_ok=True)
    run = start(0, 1, tmp_path)
    load(run)
    train(run, until=K + 1)
    left = iter(range(files))

    def killed(path, data):
        path.write_bytes(data[: len(data) // 2])
        if next(left) == files - 1:
            raise Killed
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", killed)
        assert not save(run, wait=True)
    assert len(list((tmp_path / "checkpoints").glob("*.tmp"))) == 1
    again = start(0, 1, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert load(again) == 4


@pytest.mark.parametrize("order", [sorted, lambda paths: sorted(paths, reverse=True)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_killed_during_a_rename_that_is_not_atomic_leaves_the_checkpoint_before(
    alone, two_checkpoints, tmp_path, monkeypatch, order
):
    """Such as on a mounted object store, which copies a folder file by file."""
    shutil.copytree(two_checkpoints[0], tmp_path, dirs_exist_ok=True)
    run = start(0, 1, tmp_path)
    load(run)
    train(run, until=K + 1)

    def rename(temporary, path):
        path.mkdir()
        *files, _ = order(temporary.iterdir())
        for file in files:
            file.rename(path / file.name)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", rename)
        assert not save(run, wait=True)
    warnings = []
    again = start(0, 1, tmp_path, warn=warnings.append)
    assert load(again) == 4
    (line,) = warnings
    assert line.startswith("skipping a damaged checkpoint: ")


def damage_of_one_rank(rank, folder):
    warnings = []
    run = start(rank, 2, folder, warn=warnings.append)
    for step in (2, 4):
        train(run, until=step)
        save(run, wait=True)
    if rank == 1:
        DAMAGES["a late bit"](folder / "checkpoints" / "step-00000004" / task_file(f"task/{T - 1}"))
    dist.barrier()
    run = start(rank, 2, folder, warn=warnings.append)
    return load(run), run.phi, len(warnings)


def test_all_ranks_use_the_same_checkpoint_though_one_alone_reads_the_damage(run_ranks, tmp_path):
    (step_0, phi_0, warnings_0), (step_1, phi_1, warnings_1) = run_ranks(2, damage_of_one_rank, tmp_path)
    assert step_0 == step_1 == 2
    assert torch.equal(phi_0, phi_1)
    assert (warnings_0, warnings_1) == (1, 0)


def faults_of_rank_1(rank, folder):
    """Saves at which rank 1 has a full disk, hangs, has a NaN, is slow: what each gives, and the warnings."""
    warnings, outcomes = [], []
    run = start(rank, 2, folder, warn=warnings.append)
    write_file, release = atomic.write_file, threading.Event()

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def hung(path, data):
        release.wait(30)
        write_file(path, data)

    def saved(replacement=write_file, wait=True):
        train(run, until=run.progress.step + 1)
        if rank == 1:
            atomic.write_file = replacement
        outcomes.append(save(run, wait=wait))

    saved()
    saved(full)
    checkpoint.PATIENCE = 0.5
    saved(hung, wait=False)
    if rank == 0:
        run.checkpoints._thread.join()
    checkpoint.PATIENCE = 60.0
    dist.barrier()
    saved(hung, wait=False)  # rank 0 has given up, rank 1 still writes: not yet
    release.set()
    run.checkpoints.wait()
    vector = run.learners[-1].flat.vector
    if rank == 1:
        kept, vector[-1] = vector[-1].clone(), float("nan")
    saved()
    if rank == 1:
        vector.nan_to_num_(0.0)
        vector[-1] = kept
        atomic.write_file = write_file
    outcomes.append(run.checkpoints.wait())
    return outcomes, warnings


def test_a_fault_of_one_rank_is_one_warning_and_leaves_the_last_good_checkpoint(run_ranks, tmp_path):
    (outcomes, warnings), (outcomes_1, warnings_1) = run_ranks(2, faults_of_rank_1, tmp_path)
    assert outcomes == outcomes_1 == [True, False, True, False, False, 1]
    assert warnings_1 == []
    assert len(warnings) == 4
    assert "step 2: checkpoint failed: rank 1: No space left on device" in warnings[0]
    assert warnings[0].endswith("training continues, the latest valid one is at step 1")
    assert "step 3: checkpoint failed: no files from rank 1" in warnings[1]
    assert "step 4: checkpoint failed: an earlier one is still being written" in warnings[2]
    assert "rank 1: task-task%2F3.safetensors not written: tensor 'parameters' holds NaN or Inf" in warnings[3]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-????????")] == ["step-00000001"]


def second_attempt(rank, folder, late_rank):
    """Rank 0's disk is full at once; rank 1 comes late, so that its files of the first attempt outlive it."""
    checkpoint.PATIENCE = 20.0
    has_begun, has_failed = folder / "has-begun", folder / "has-failed"
    run = start(rank, 2, folder, warn=lambda text: has_failed.touch())
    write_file, remove = atomic.write_file, run.checkpoints._remove_leftovers
    train(run, until=1)

    def full(path, data):
        while not has_begun.exists():  # or rank 1 could find no folder to write to, and leave nothing behind
            time.sleep(0.01)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def late(path, data):
        has_begun.touch()
        while not has_failed.exists():
            time.sleep(0.01)
        path.parent.mkdir(exist_ok=True)
        write_file(path, data)

    atomic.write_file = late if rank == 1 else full
    assert not save(run, wait=True)
    left_behind = len(list((folder / "checkpoints").glob("*.tmp")))
    for learner in run.learners:
        learner.flat.vector.add_(1.0)
    atomic.write_file = write_file
    if late_rank == rank == 1:
        atomic.write_file = lambda path, data: (time.sleep(0.2), write_file(path, data))
    if late_rank == rank == 0:  # when the other's files are there already
        run.checkpoints._remove_leftovers = lambda but: (time.sleep(0.3), remove(but))
    assert save(run, wait=True)
    expected = tensors(run)
    run = start(rank, 2, folder)
    return left_behind, load(run), differing(tensors(run), expected)


@pytest.mark.parametrize("late_rank", [0, 1])
def test_files_of_an_attempt_that_failed_do_not_get_into_the_next(run_ranks, tmp_path, late_rank):
    assert run_ranks(2, second_attempt, tmp_path, late_rank) == [(1, 1, []), (1, 1, [])]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_every_file_and_folder_is_on_the_disk_before_the_checkpoint_has_its_name(alone, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(descriptor):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", recorded)
    assert save(start(0, 1, tmp_path), step=1, wait=True)
    *files, temporary, folder = synced
    assert folder == str(tmp_path / "checkpoints")
    assert {os.path.dirname(path) for path in files} == {temporary}
    assert temporary.endswith(".tmp")
    stored = (tmp_path / "checkpoints" / "step-00000001").iterdir()
    assert sorted(map(os.path.basename, files)) == sorted(path.name for path in stored)
    assert files[-1].endswith(MANIFEST)


def test_a_full_disk_is_one_warning_and_the_next_save_succeeds(alone, small_disk):
    folder = small_disk(300)
    warnings = []
    run = start(0, 1, folder, warn=warnings.append)
    assert save(run, step=1, wait=True)
    ballast = folder / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(1 << 20))
    train(run)
    assert not save(run, wait=True)
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert run.checkpoints.folder.joinpath("step-00000001").exists()
    assert len(list(run.checkpoints.folder.iterdir())) == 1
    ballast.unlink()
    assert save(run, wait=True)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000015"]


def test_a_folder_that_becomes_read_only_is_one_warning_and_can_still_be_read(alone, small_disk):
    folder = small_disk(3000)
    warnings = []
    run = start(0, 1, folder, warn=warnings.append)
    assert save(run, step=1, wait=True)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert not save(run, step=2, wait=True)
    assert len(warnings) == 1
    assert "Read-only file system" in warnings[0]
    assert load(start(0, 1, folder)) == 1


def config_that_gives_up(minutes):
    return RunConfig(checkpoint=CheckpointConfig(every_steps=0, give_up_minutes=minutes))


def block(folder):
    """Nothing can be written into `folder` until the file in its place is removed."""
    shutil.rmtree(folder)
    folder.touch()


def test_a_repeated_failure_is_reported_at_the_1st_10th_and_100th_time(alone, tmp_path):
    warnings = []
    run = start(0, 1, tmp_path, config_that_gives_up(0), warn=warnings.append)
    block(run.checkpoints.folder)
    for step in range(1, 101):
        assert not save(run, step=step)
    assert warnings == [
        f"step {step}: checkpoint failed: File exists{times}; training continues, no valid checkpoint yet"
        for step, times in ((1, ""), (10, " (10 times so far)"), (100, " (100 times so far)"))
    ]


def test_a_run_whose_saves_fail_for_too_long_tries_once_more_and_gives_up(alone, tmp_path, monkeypatch):
    run, clock = start(0, 1, tmp_path, config_that_gives_up(30), warn=lambda line: None), [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    assert save(run, step=1, wait=True)
    block(run.checkpoints.folder)
    for clock[0] in (10_000, 10_000 + 29 * 60):  # counted from the first failure, not from the last good save
        assert not save(run, step=2)
    clock[0] = 10_000 + 31 * 60
    with pytest.raises(RunError, match=r"step 3: no checkpoint could be saved for 31 minutes \(.*File exists.*resume"):
        save(run, step=3)
    run.checkpoints.folder.unlink()
    assert save(run, step=4)
    assert run.checkpoints.newest == 4  # it has waited for this one
    clock[0] += 10**6
    block(run.checkpoints.folder)
    assert not save(run, step=5)  # a good save starts the count again


def test_a_deleted_folder_of_checkpoints_is_created_again(alone, tmp_path):
    run = start(0, 1, tmp_path)
    for _ in range(2):
        assert save(run, step=1, wait=True)
        shutil.rmtree(run.checkpoints.folder)
    assert save(run, step=1, wait=True)
    assert load(start(0, 1, tmp_path)) == 1


def test_keep_and_keep_every(alone, tmp_path):
    config = RunConfig(checkpoint=CheckpointConfig(every_steps=2, keep=2, keep_every=5))
    run = start(0, 1, tmp_path, config)
    due = [step for step in range(1, 16) if run.checkpoints.due(step)]
    assert due == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    for step in due:
        save(run, step=step, wait=True)
    assert run.checkpoints.steps() == [5, 10, 14, 15]


def due_by_the_clock(rank, folder):
    """The steps that are due, and how often the ranks communicated about it; their clocks differ."""
    clock, asked = 0.0, 0

    def counted(value, original=schedule.from_rank_0):
        nonlocal asked
        asked += 1
        return original(value)

    schedule.time = SimpleNamespace(monotonic=lambda: clock)
    schedule.from_rank_0 = counted
    run = start(rank, 2, folder, RunConfig(checkpoint=CheckpointConfig(every_steps=0, every_minutes=1)))
    due = []
    for step in range(1, 401):
        clock += (0.625, 1.7)[rank]
        if run.checkpoints.due(step):
            due.append(step)
            save(run, step=step)
    return due, asked


def test_minutes_are_those_of_rank_0_and_all_ranks_agree(run_ranks, tmp_path):
    (due, asked), (due_1, _) = run_ranks(2, due_by_the_clock, tmp_path)
    assert due == due_1 == [96, 192, 288, 384]
    assert asked < 50


def test_a_config_that_does_not_fit_is_refused_with_the_keys(alone, two_checkpoints):
    changed = RunConfig(seed=1, episodes=9, inner=InnerConfig(lr=0.1), checkpoint=CheckpointConfig(keep=5))
    with pytest.raises(ValueError, match=r"does not match .*: inner\.lr was 0\.05, is 0\.1; seed was 0, is 1; restore"):
        load(start(0, 1, two_checkpoints[0], changed))


def test_a_checkpoint_without_a_key_that_came_later_resumes_with_its_default(alone, two_checkpoints, tmp_path):
    """As after an update of the package."""
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    newest = folder / "checkpoints" / "step-00000004"
    manifest = read_manifest(newest)
    values = {key: value for key, value in manifest.config.items() if key != "reduction"}
    write_manifest(newest, manifest.model_copy(update={"config": values}))
    assert load(start(0, 1, folder)) == 4
    with pytest.raises(ValueError, match=r"reduction was ordered, is mean; restore"):
        load(start(0, 1, folder, RunConfig(reduction="mean")))


def test_what_may_differ_are_keys_of_a_training_run():
    config = TrainConfig(tasks=["a"]).model_dump(mode="json")
    for free in MAY_DIFFER:
        assert len(config_difference(config, {}, [free])) < len(config_difference(config, {})), free


def test_config_difference_names_new_and_lost_keys_and_passes_over_free_ones():
    saved = {"a": 1, "section": {"b": [1, 2], "c": None}, "free": {"x": 1}, "freedom": 1}
    now = {"a": 1.5, "section": {"b": [1, 2], "d": None}, "free": {"x": 2, "y": 3}, "freedom": 2}
    assert config_difference(saved, saved) == []
    assert config_difference(saved, now, ["free", "a"]) == [
        "freedom was 1, is 2",
        "section.c was None, is absent",
        "section.d was absent, is None",
    ]


def test_a_model_of_another_shape_is_refused(alone, two_checkpoints):
    run = start(0, 1, two_checkpoints[0])
    model, head = models.build(TINY, 7, "head", 0)
    run.learners[0] = TaskLearner("task/0", model, head, MemoryBatches(0), run.config.inner)
    with pytest.raises(ValueError, match=r"task-task%2F0\.safetensors was saved from a model with other tensors"):
        load(run)


def test_names_of_tasks_and_of_files_stay_in_the_folder(alone, tmp_path):
    run = start(0, 1, tmp_path, RunConfig(tasks=1))
    run.learners[0].name = "../../a: b\nc"
    assert save(run, step=1, wait=True)
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [PHI, task_file(run.learners[0].name)]
    assert load(run) == 1
    manifest = read_manifest(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(ValueError, match="not listed in its manifest"):
        read_state(tmp_path / "checkpoints" / "step-00000001" / MANIFEST, manifest)


def test_nothing_is_a_pickle(two_checkpoints):
    paths = [path for path in two_checkpoints[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".json", ".safetensors"}


def test_the_phi_of_a_checkpoint_and_an_exported_phi_are_read_alike(alone, two_checkpoints, tmp_path):
    named = load_phi(two_checkpoints[0] / "checkpoints" / "step-00000004" / PHI)
    run = start(0, 1, two_checkpoints[0])
    load(run)
    assert differing(named, run.layout.views(run.phi)) == []
    model = models.build(TINY, 3, "head", 0)[0]
    assert {name for name, _ in model.named_parameters()} - named.keys() == {"fc.weight", "fc.bias"}
    model.load_state_dict(named, strict=False)
    export_phi(tmp_path / "phi.safetensors", named, {"step": "4"})
    assert differing(load_phi(tmp_path / "phi.safetensors"), named) == []
    assert [path.name for path in tmp_path.iterdir()] == ["phi.safetensors"]
