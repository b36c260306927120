"""A network that fails between two hosts: the ranks exit or resume in time, and phi stays bit-identical.

Each host is a network namespace of this machine with one rank; rank r is on host r. Needs root and iproute2.
"""

import re
import signal
import subprocess
import time

import pytest

from benchmarks.namespaces import INTERFACE
from tests.helpers.commands import assert_equal, phi, records
from tests.helpers.small_run import LIMIT, errors

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * LIMIT)]
RESUMES = "run the same command to resume from the latest checkpoint"


@pytest.fixture
def run(network, torchrun, fault, tmp_path):
    """run(*keys, store=0, nodes="2", restarts=0, **link): torchrun on two hosts; the rendezvous is on host `store`.

    Rank 1 waits in a step for the `cut` of the link. Returns the commands and the link.
    """

    def run(*keys, store=0, nodes="2", restarts=0, retries=15, **link):
        machines, link = network(2, **link)
        for machine in machines:
            command = machine.command("sh", "-c", f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")
            subprocess.run(command, check=True)
        rendezvous = [f"--rdzv-endpoint={machines[store].address}:29400", "--rdzv-backend=c10d", "--rdzv-id=test"]
        environment = {"GLOO_SOCKET_IFNAME": INTERFACE, **fault("wait", 1, argument=str(tmp_path / "cut"))}
        commands = []
        for number, machine in enumerate(machines):
            own = [f"--local-addr={machine.address}", f"--rdzv-conf=is_host={int(number == store)}"]
            options = [*rendezvous, *own, f"--nnodes={nodes}", f"--max-restarts={restarts}", "--shutdown-timeout=5"]
            commands.append(torchrun(*keys, ranks=1, host=machine, options=options, environment=environment))
        return commands, link

    return run


@pytest.fixture
def cut(until, tmp_path):
    """cut(link, seconds=None): cuts the link in the middle of a step, for good or for some seconds."""

    def cut(link, seconds=None):
        until((tmp_path / "once").exists)
        link.cut = True
        (tmp_path / "cut").touch()
        if seconds:
            time.sleep(seconds)
            link.cut = False

    return cut


def lost(err, rank):
    """The errors of a host after it lost the host of `rank`."""
    (line,) = errors(err)
    assert re.match(
        rf"error: (rank {rank} \(task {'ab'[rank]}\), in step \d+, died or does not respond"
        rf"|rank {1 - rank}: the other ranks and torchrun's store are unreachable \(.*\)); {RESUMES}$",
        line,
    ), line


@pytest.mark.parametrize(("store", "retries"), [(0, 15), (1, 5)])
def test_a_link_that_is_cut_for_good_ends_all_ranks_and_agents(
    run, cut, train, tmp_path, uninterrupted, store, retries
):
    """Rank 1 kills its agent. The other one hangs if the rendezvous is on host 1, until the kernel gives up."""
    commands, link = run("timeout_seconds=8", store=store, retries=retries)
    cut(link)
    for rank, command in enumerate(commands):
        code, _, err = command.finish(LIMIT)
        assert code == (1, -signal.SIGKILL)[rank], err
        lost(err, 1 - rank)
    codes, err = train()
    assert codes == [0, 0], err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


def test_the_kernel_bounds_how_long_an_agent_with_restarts_left_waits_for_the_network(run, cut):
    """docs/running.md names the setting."""
    commands, link = run("timeout_seconds=8", restarts=1, retries=5)
    cut(link)
    code, _, err = commands[1].finish(LIMIT)
    assert code == 1, err
    lost(err, 0)
    assert "RendezvousConnectionError" in err


@pytest.mark.parametrize(("seconds", "timeout"), [(5, 60), (25, 8)])
def test_a_link_that_is_cut_for_a_while_delays_or_restarts_the_run(run, cut, tmp_path, uninterrupted, seconds, timeout):
    commands, link = run(f"timeout_seconds={timeout}", restarts=3)
    cut(link, seconds)
    ends = [command.finish(LIMIT) for command in commands]
    err = "".join(err for *_, err in ends)
    assert [code for code, *_ in ends] == [0, 0], err
    assert ("resuming from checkpoint at step " in err) == (timeout < seconds)
    # A restarted run may miss its timeout again on a busy machine.
    assert len(errors(err)) >= 2 if timeout < seconds else not errors(err), err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_of_one_or_two_nodes_continues_on_the_node_that_is_left(run, cut, tmp_path, uninterrupted, rank):
    """The lost node is cut off, so that its rank lives on until it notices; with rank 0 it holds the folder's lock."""
    commands, link = run("timeout_seconds=8", nodes="1:2", restarts=3, store=1 - rank)
    cut(link)
    code, _, err = commands[1 - rank].finish(LIMIT)
    assert code == 0, err
    assert "resuming from checkpoint at step " in err
    assert_equal(phi(tmp_path / "run"), uninterrupted)


def test_a_slow_link_that_loses_packets_delays_and_changes_nothing(run, tmp_path, uninterrupted):
    (tmp_path / "cut").touch()  # nothing is cut
    commands, link = run("timeout_seconds=60", delay_ms=20, rate_mbit=10, loss=0.02)
    ends = [command.finish(LIMIT) for command in commands]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert link.dropped > 0
    assert max(record["steps_per_second"] for record in records(tmp_path / "run")) < 1000 / 20
    assert_equal(phi(tmp_path / "run"), uninterrupted)
