"""MODEL of a step whose all-reduce runs while later steps compute: messages in flight share the wire."""

import heapq
import math
from typing import NamedTuple

SEGMENT = 2**20  # gloo's largest, bytes


class Send(NamedTuple):
    """Part of a message: seconds for which it occupies the wire, and seconds from then until the next part is ready."""

    wire: float
    latency: float


def delayed_step(compute: float, sends: list[Send], delay: int, steps: int = 200) -> float:
    """Seconds of a step that computes for `compute` seconds and whose message is waited for `delay` steps later.

    A message leaves as soon as its step has computed, as `sends` one after another, and step k + d + 1 starts once that
    of step k has arrived. Sends that are ready share the wire equally, as TCP connections do. All ranks behave alike,
    so that one rank's wire stands for all.
    """
    ready: list[tuple[float, int, int]] = []  # when a message's next send is ready; the message; the send
    sending: dict[int, list[float]] = {}  # of a message: seconds that its send still needs the whole wire; the send
    arrived: dict[int, float] = {}
    now = clock = half = 0.0  # of the ranks, and of the wire
    for step in range(steps):
        now += compute
        heapq.heappush(ready, (now, step, 0))
        while (due := step - delay) >= 0 and due not in arrived:
            first = min(sending, key=lambda message: sending[message][0], default=None)
            end = clock + sending[first][0] * len(sending) if first is not None else math.inf
            then = max(clock, min(end, ready[0][0] if ready else math.inf))
            for send in sending.values():
                send[0] -= (then - clock) / len(sending)
            clock = then
            if then < end:
                _, message, number = heapq.heappop(ready)
                sending[message] = [sends[number].wire, number]
                continue
            number = int(sending.pop(first)[1])
            if number + 1 < len(sends):
                heapq.heappush(ready, (clock + sends[number].latency, first, number + 1))
            else:
                arrived[first] = clock + sends[number].latency
        now = max(now, arrived.get(due, 0.0))
        half = now if step == steps // 2 else half
    return (now - half) / (steps - 1 - steps // 2)


def ring(hosts: int, size: int, latency: float, wire: float, overhead: float) -> list[Send]:
    """gloo's ring all-reduce of `size` bytes over one rank per host, one-way `latency` apart.

    2 (W - 1) times, a rank passes 1 / W of the message to its neighbour, in segments, two at a time; each time the
    neighbour first says in an empty packet that it is ready. `wire`: seconds for which the message as a whole would
    occupy a wire; `overhead`: an all-reduce's CPU time.
    """
    rounds = 2 * (hosts - 1) * max(1, math.ceil(size / hosts / (2 * SEGMENT)))
    occupied = 2 * (hosts - 1) * wire / hosts
    return [Send(0.0, latency), Send(occupied / rounds, latency + overhead / rounds)] * rounds
