"""Shared by all tests: ranks as processes, small tasks in memory."""

import multiprocessing
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.register_assert_rewrite("tests.helpers")
from benchmarks.namespaces import hosts  # noqa: E402
from tests.helpers.batches import write_task  # noqa: E402
from tests.helpers.commands import Command  # noqa: E402

torch.set_num_threads(1)
# Ranks are forked from a server process that has everything imported and no thread started. torch._dynamo, which the
# first optimizer of a process imports, costs 2.5 seconds of CPU; matplotlib draws curves.png; pytest and hypothesis
# come with the test's own module.
multiprocessing.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "dist_cts.run.train",
        "dist_cts.run.meta_test",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "pytest",
        "hypothesis",
    ]
)


def _rank_main(rank, world_size, folder, scenario, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(scenario(rank, *args), folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def run_ranks(tmp_path):
    """run_ranks(W, scenario, *args): runs scenario(rank, *args) on W gloo processes; the return values by rank."""

    def run(world_size, scenario, *args):
        folder = tmp_path / f"ranks-{len(list(tmp_path.glob('ranks-*')))}"
        folder.mkdir()
        mp.start_processes(
            _rank_main, (world_size, folder, scenario, args), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with the prepared tasks a, b, c, d, of two sizes and several class counts."""
    folder = tmp_path_factory.mktemp("tasks")
    for index, name in enumerate("abcd"):
        write_task(folder, name, classes=3 + index, pixels=8 + 4 * (index % 2), seed=index)
    return folder


@pytest.fixture
def start(tmp_path):
    """start(script, *arguments, **options) -> Command; whatever still runs at the end is killed."""
    started = []

    def start(script, *arguments, **options):
        folder = tmp_path / f"command-{len(started)}"
        folder.mkdir()
        started.append(Command(script, *arguments, folder=folder, **options))
        return started[-1]

    yield start
    for command in started:
        command.kill()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size): a tmpfs folder of `size` KiB; skips the test where mounting is not allowed."""
    mounted = []

    def mount(kibibytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def network():
    """network(number, **link): hosts and their link, as `benchmarks.namespaces.hosts`; skips where it raises."""
    with ExitStack() as stack:

        def network(number, **link):
            try:
                return stack.enter_context(hosts(number, **link))
            except OSError as error:
                pytest.skip(str(error))

        yield network


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """An empty working folder, which must stay empty: no file executes anything."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("cwd")
    os.chdir(folder)
    yield
    os.chdir(before)
    assert not any(folder.iterdir())
