"""Hosts on one machine: network namespaces joined by a link with a chosen latency, rate and loss, which can be cut.

Needs root, iproute2, nsenter and /dev/net/tun, but not the kernel's netem: a thread relays the packets between one TUN
device per host. Nothing outlives the process that created the hosts, even if it is killed.
"""

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

INTERFACE = "eth0"
QUEUE_SECONDS = 0.2  # the link's buffer; packets that would wait longer for their turn are dropped
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Host(NamedTuple):
    """A network namespace with the interface eth0."""

    address: str
    namespace: int  # a file descriptor
    tun: int  # file descriptor: reads what the host sends, writes what it receives

    def command(self, *arguments: object) -> list[str]:
        """The command line that runs `arguments` on this host."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}", *map(str, arguments)]


class Link:
    """Relays packets between the hosts from a thread. All attributes may be changed at any time."""

    def __init__(self, hosts: Sequence[Host], delay_ms: float, rate_mbit: float, loss: float, seed: int) -> None:
        self.hosts, self.delay_ms, self.rate_mbit, self.loss = hosts, delay_ms, rate_mbit, loss
        self.cut = False  # drops every packet without notice, as a failed switch does
        self.packets = self.bytes = self.dropped = 0
        self._random, self._closed = random.Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _relay(self) -> None:
        tuns = {bytes(map(int, host.address.split("."))): host.tun for host in self.hosts}
        free, order = dict.fromkeys(tuns.values(), 0.0), itertools.count()  # when each host's sender is free again
        queue: list[tuple[float, int, int, bytes]] = []
        while not self._closed.is_set():
            wait = min(0.1, max(0.0, queue[0][0] - time.monotonic())) if queue else 0.1
            for tun in select.select(list(free), [], [], wait)[0]:
                packet, now = os.read(tun, 65535), time.monotonic()
                to = tuns.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                if to is None:  # IPv6 or multicast
                    continue
                sent = max(now, free[tun]) + (8e-6 * len(packet) / self.rate_mbit if self.rate_mbit else 0.0)
                if self.cut or self._random.random() < self.loss or sent - now > QUEUE_SECONDS:
                    self.dropped += 1
                    continue
                free[tun] = sent
                heapq.heappush(queue, (sent + self.delay_ms / 1000, next(order), to, packet))
            while queue and queue[0][0] <= time.monotonic():
                *_, to, packet = heapq.heappop(queue)
                self.packets, self.bytes = self.packets + 1, self.bytes + len(packet)
                with suppress(OSError):
                    os.write(to, packet)


@contextmanager
def hosts(
    number: int, delay_ms: float = 0.0, rate_mbit: float = 0.0, loss: float = 0.0, mtu: int = 1500, seed: int = 0
) -> Iterator[tuple[list[Host], Link]]:
    """`number` hosts, 10.99.0.1, 10.99.0.2, ..., and the link between them.

    Every packet takes `delay_ms` one way and is lost with probability `loss`; every host sends at most `rate_mbit`
    Mbit/s (0: as fast as the relay). The caller ends the processes that it started on the hosts.

    Raises:
        OSError: namespaces or TUN devices cannot be created; the message says why.
    """
    if os.geteuid():
        raise PermissionError("network namespaces need root")
    if missing := [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]:
        raise FileNotFoundError(f"network namespaces need {' and '.join(missing)} (iproute2, util-linux)")
    with ExitStack() as stack:
        made = [_host(stack, f"10.99.0.{index + 1}", mtu) for index in range(number)]
        link = Link(made, delay_ms, rate_mbit, loss, seed)
        stack.callback(link.close)
        yield made, link


def _host(stack: ExitStack, address: str, mtu: int) -> Host:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    stack.callback(os.close, tun)
    request = struct.pack("16sH14x", b"", _IFF_TUN | _IFF_NO_PI)
    device = fcntl.ioctl(tun, _TUNSETIFF, request)[:16].rstrip(b"\0").decode()
    name = f"host-{os.getpid()}-{tun}"  # only while it is set up: the descriptor keeps the namespace
    _ip("netns", "add", name)
    try:
        namespace = os.open(f"/run/netns/{name}", os.O_RDONLY)
        stack.callback(os.close, namespace)
        _ip("link", "set", device, "netns", name, "name", INTERFACE, "mtu", mtu)
        _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", name, "link", "set", interface, "up")
    finally:
        _ip("netns", "delete", name)
    return Host(address, namespace, tun)


def _ip(*arguments: object) -> None:
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(map(str, arguments))}: {done.stderr.strip()}")
