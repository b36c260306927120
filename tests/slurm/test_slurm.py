"""The scripts of launch/slurm on a real SLURM: preempted, timed-out and two-node jobs give the same bits."""

import json
import re
import subprocess
import sys
from datetime import datetime

import pytest
import safetensors.torch
import torch
import yaml

from tests.slurm.cluster import GRACE, ROOT, Cluster, missing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

ONE_NODE = "--cpus-per-task=2", ROOT / "launch/slurm/train.sbatch"
TWO_NODES = "--nodes=2", "--cpus-per-task=1", ROOT / "launch/slurm/train_multinode.sbatch"
# In a job's first start its ranks take so many seconds more, a batch (SLOW) or before they listen to signals (DEAF):
# time to disturb them. On node STUCK torchrun never exits.
SLOWER = """\
import atexit, os, signal, time
def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)
if "RANK" not in os.environ and os.environ.get("STUCK") == os.environ.get("SLURM_NODEID", "none"):
    atexit.register(hang)
if "RANK" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(float(os.environ.get("DEAF", 0)))
    if "SLOW" in os.environ:
        import dist_cts.data.augment as module
        plain = module.augment
        def augment(*args, **kwargs):
            time.sleep(float(os.environ["SLOW"]))
            return plain(*args, **kwargs)
        module.augment = augment
"""
STEPS = 2000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tasks):
    if lacking := missing():
        pytest.skip(lacking)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        (cluster.work / "sitecustomize.py").write_text(SLOWER)
        config = {
            "tasks": ["a", "b"],
            "episodes": STEPS // 100,
            "inner_steps": 100,
            "meta_lr": 0.1,
            "batch_size": 8,
            "log_every": 20,
            "device": "cpu",
            "model": {"name": "tiny"},
            "data": {"root": str(tasks)},
            "checkpoint": {"every_steps": 0},
        }
        (cluster.work / "small.yaml").write_text(yaml.safe_dump(config))
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def uninterrupted(cluster):
    """phi of the same run without SLURM."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "launch/train.py"]
    command += ["--config", "small.yaml", "run_dir=runs/uninterrupted"]
    subprocess.run(command, cwd=cluster.work, env=cluster.environment, check=True, timeout=1000, capture_output=True)
    return phi(cluster, "uninterrupted")


def phi(cluster, run):
    return safetensors.torch.load_file(cluster.work / "runs" / run / "phi.safetensors")


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def trains(cluster, job):
    metrics = cluster.work / "runs" / f"slurm-{job}" / "metrics.jsonl"
    state = cluster.wait(job, lambda: metrics.exists() and metrics.read_text())
    assert state["JobState"] == "RUNNING", cluster.log(job)


def assert_went_on(cluster, job, state, uninterrupted):
    """The job was requeued once and resumed in the same folder at the step where it had stopped."""
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    stopped = re.findall(r"stopped at step (\d+) with a checkpoint", cluster.log(job))
    assert len(stopped) == 1, cluster.log(job)
    assert 0 < int(stopped[0]) < STEPS
    assert re.findall(r"resuming from checkpoint at step (\d+)", cluster.log(job)) == stopped
    assert not (cluster.work / "runs" / f"slurm-{job}" / "stopped").exists()
    assert_same_bits(phi(cluster, f"slurm-{job}"), uninterrupted)


def test_a_preempted_job_resumes_in_its_folder_bit_identically(cluster, uninterrupted):
    job = cluster.sbatch(*ONE_NODE, "small.yaml", SLOW="0.05")
    trains(cluster, job)
    urgent = cluster.sbatch("--partition=high", "--nodes=2", "--wrap=true")
    # As soon as the ranks have stopped, not at the end of the grace.
    assert cluster.finish(urgent, timeout=GRACE / 2)["JobState"] == "COMPLETED"
    assert_went_on(cluster, job, cluster.finish(job), uninterrupted)


def test_a_job_that_is_preempted_before_its_ranks_listen_is_requeued(cluster, uninterrupted):
    job = cluster.sbatch(*ONE_NODE, "small.yaml", DEAF="180")
    cluster.wait(job, lambda: f"{job}.0" in cluster.run("squeue", "-hs", "-j", job, "-o", "%i"))
    cluster.sbatch("--partition=high", "--nodes=2", "--wrap=true")
    state = cluster.finish(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert "stopped at step" not in cluster.log(job)
    assert_same_bits(phi(cluster, f"slurm-{job}"), uninterrupted)


def test_a_timed_out_job_resumes_bit_identically(cluster, uninterrupted):
    job = cluster.sbatch("--time=60", "--signal=TERM@120", *ONE_NODE, "small.yaml", SLOW="0.05")
    trains(cluster, job)
    run = datetime.now() - datetime.fromisoformat(cluster.job(job)["StartTime"])
    time_is_up_in_two_minutes = f"TimeLimit={run.seconds // 60 + 2}"
    cluster.run("scontrol", "update", f"JobId={job}", time_is_up_in_two_minutes)
    cluster.wait(job, lambda: cluster.job(job)["Restarts"] == "1")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert_went_on(cluster, job, cluster.finish(job), uninterrupted)


def test_of_an_array_the_stopped_job_alone_is_requeued_and_a_cancelled_one_is_not(cluster):
    options = "--array=1,5", "--cpus-per-task=2", ROOT / "launch/slurm/array.sbatch", "small.yaml"
    array = cluster.sbatch(*options, SLOW="0.05")
    cancelled, stopped = f"{array}_1", f"{array}_5"
    trains(cluster, cancelled)
    trains(cluster, stopped)
    cluster.run("scancel", "--signal=TERM", stopped)
    state = cluster.wait(stopped, lambda: cluster.job(stopped)["Restarts"] == "1")
    assert state["Restarts"] == "1", cluster.log(stopped)
    assert cluster.job(cancelled)["Restarts"] == "0"
    cluster.run("scancel", cancelled)
    assert cluster.finish(cancelled)["JobState"] == "CANCELLED"
    assert "with a checkpoint" in cluster.log(cancelled)
    assert cluster.finish(stopped)["JobState"] == "COMPLETED"
    for job, expected in ((cancelled, ("cts", 0.1, 1)), (stopped, ("reptile", 1, 2))):
        config = yaml.safe_load((cluster.work / "runs" / f"slurm-{job}" / "config.yaml").read_text())
        assert (config["algorithm"], config["meta_lr"], config["seed"]) == expected
    state = cluster.job(cancelled)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")


def test_two_nodes_stop_together_and_resume_bit_identically(cluster, uninterrupted):
    job = cluster.sbatch(*TWO_NODES, "small.yaml", INTERFACE="lo", SLOW="0.05")
    trains(cluster, job)
    cluster.run("scancel", "--signal=TERM", job)
    state = cluster.finish(job)
    assert state["NumNodes"] == "2"
    assert_went_on(cluster, job, state, uninterrupted)
    environment = json.loads((cluster.work / "runs" / f"slurm-{job}" / "environment.json").read_text())
    assert environment["world_size"] == 2


def test_an_error_ends_the_job_and_the_interface_is_the_one_named(cluster):
    job = cluster.sbatch(*TWO_NODES, "small.yaml", INTERFACE="nosuch0")
    state = cluster.finish(job)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert "nosuch0" in cluster.log(job)


def test_a_node_whose_torchrun_hangs_does_not_hold_the_job(cluster):
    job = cluster.sbatch(*TWO_NODES, "small.yaml", INTERFACE="nosuch0", STUCK="1", SLURM_WAIT="5")
    state = cluster.finish(job)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), cluster.log(job)
