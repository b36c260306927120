"""benchmarks/namespaces.py: hosts that reach each other over a link with latency, rate and loss, until it is cut."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.namespaces import hosts

ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
    echo.bind(("", 5000))
    print("ready", flush=True)
    while True:
        echo.sendto(*echo.recvfrom(9000))
"""
ASK = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:
    ask.settimeout(float(sys.argv[2]))
    started = time.monotonic()
    ask.sendto(bytes(1000), (sys.argv[1], 5000))
    try:
        assert len(ask.recv(9000)) == 1000
        print(time.monotonic() - started)
    except TimeoutError:
        print("none")
"""


def ask(host, address, seconds=60):
    done = subprocess.run(host.command(sys.executable, "-c", ASK, address, seconds), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return None if done.stdout == "none\n" else float(done.stdout)


def test_packets_take_the_link_s_time_and_none_arrive_once_it_is_cut(network):
    machines, link = network(3, delay_ms=100)
    echo = subprocess.Popen(machines[2].command(sys.executable, "-c", ECHO), stdout=subprocess.PIPE)
    try:
        assert echo.stdout.readline() == b"ready\n"
        for machine in machines[:2]:
            assert ask(machine, "10.99.0.3") >= 0.2
        link.delay_ms, link.rate_mbit = 0, 0.1
        assert ask(machines[0], "10.99.0.3") >= 2 * 1028 * 8 / 1e5
        for attribute, value in (("loss", 1.0), ("cut", True)):
            setattr(link, attribute, value)
            assert ask(machines[0], "10.99.0.3", seconds=0.5) is None
            setattr(link, attribute, 0)
            assert ask(machines[0], "10.99.0.3") is not None
    finally:
        echo.kill()
        echo.communicate()


def test_nothing_is_left_of_the_hosts():
    places = "/proc/self/fd", "/sys/class/net"
    before = [set(os.listdir(place)) for place in places]
    try:
        with hosts(2) as (machines, _):
            inside = machines[0].command("cat", "/proc/net/dev")
            assert "eth0" in subprocess.run(inside, capture_output=True, text=True).stdout
    except OSError as error:
        pytest.skip(str(error))
    deadline = time.monotonic() + 100
    while any(set(os.listdir(place)) - was for place, was in zip(places, before, strict=True)):  # others make some, too
        assert time.monotonic() < deadline
        time.sleep(0.05)
