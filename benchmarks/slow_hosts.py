"""The hosts of benchmarks/slow_network.py: a rank in each network namespace, and the methods that it can step."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import learners, namespaces
from dist_cts.distributed.malloc import keep_freed_memory
from dist_cts.learner import TaskLearner
from dist_cts.run.exit_codes import exit_process

PORT = 5001
TCP = {"tcp_rmem": "4096 16777216 67108864", "tcp_wmem": "4096 16777216 67108864", "tcp_slow_start_after_idle": "0"}
SLEEP, EVERY = 0.05, 10  # a straggler's seconds, and steps


class Rank:
    """One rank's methods; the coordinator says over stdin what to do."""

    def __init__(self, methods: list[str], model: str, batch_size: int, pixels: int, sleep_ms: float) -> None:
        noise, world_size = learners.Noise(torch.device("cpu"), pixels=pixels), dist.get_world_size()

        def learner() -> TaskLearner:
            made = learners.make_learner(noise, model, batch_size)
            if sleep_ms:
                made.compute_gradient = lambda batch: (time.sleep(sleep_ms / 1e3), made.loss, made.loss)[1:]
            return made

        self.steps: dict[str, Callable[[], object]] = {}
        self.ahead: dict[str, int] = {}
        for name in methods:
            kind, *options = name.split()
            if kind == "cts":
                delay, *wire = options
                self.ahead[name], keys = int(delay), {"wire": wire[0]} if wire else {}
                self.steps[name] = learners.MetaTraining([learner()], world_size, delay=int(delay), **keys).step
            elif kind == "reptile":
                self.steps[name] = learners.MetaTraining([learner()], world_size, algorithm="reptile").step
            elif kind == "sgd" and sleep_ms:
                self.steps[name] = learner().inner_step
            else:
                plain = learners.PlainTask(noise, model, batch_size)
                if kind == "ddp":
                    plain.model = DistributedDataParallel(
                        plain.model, gradient_as_bucket_view=True, broadcast_buffers=False
                    )
                self.steps[name] = plain.step
        self.taken = 0
        self.zeros = torch.zeros(learners.MetaTraining([learner()], world_size).reducer.message_numel)

    def block(self, name: str, steps: int, straggler: str = "none") -> dict[str, float]:
        """Seconds per step over a block, on the slowest rank; CPU seconds per step and rank; steps with the warm-up.

        Where latency is the limit, d + 1 steps follow one another and then wait: without stragglers, a block is `steps`
        rounded up to whole cycles of this kind.
        """
        step, rank, world_size = self.steps[name], dist.get_rank(), dist.get_world_size()
        late = {"none": -1, "one": 0 if rank == 1 else -1, "each": rank * EVERY // world_size}[straggler]
        cycle = self.ahead.get(name, 0) + 1
        warm_up = 2 * cycle  # until as many reductions are in flight as will be
        steps = -(-steps // cycle) * cycle if straggler == "none" else steps
        dist.barrier()
        for _ in range(warm_up):
            step()
        started, used = time.perf_counter(), time.process_time()
        for number in range(steps):
            if number % EVERY == late:
                time.sleep(SLEEP)
            step()
        seconds = torch.tensor((time.perf_counter() - started) / steps)
        cpu = torch.tensor((time.process_time() - used) / steps / world_size)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        dist.all_reduce(cpu)
        return {"seconds": seconds.item(), "cpu_seconds": cpu.item(), "steps": warm_up + steps}

    def all_reduce(self, rounds: int) -> float:
        """Median seconds of a blocking all-reduce of the reducer's message."""
        times = []
        for _ in range(rounds):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(self.zeros)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def ping(self, address: str, megabytes: int) -> dict[str, float]:
        """Round-trip time and rate of a TCP connection between ranks 0 and 1."""
        result, data = {}, bytes(2**20)
        if dist.get_rank() == 1:
            with socket.create_server(("", PORT)) as server:
                dist.barrier()
                connection, _ = server.accept()
                for _ in range(20):
                    connection.sendall(connection.recv(1))
                left = megabytes * 2**20
                while left:
                    left -= len(connection.recv(2**20))
                connection.sendall(b"x")
        else:
            dist.barrier()
        if dist.get_rank() == 0:
            with socket.create_connection((address, PORT)) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                times = []
                for _ in range(20):
                    started = time.perf_counter()
                    connection.sendall(b"x")
                    connection.recv(1)
                    times.append(time.perf_counter() - started)
                started = time.perf_counter()
                for _ in range(megabytes):
                    connection.sendall(data)
                connection.recv(1)
                result["round_trip_ms"] = 1e3 * statistics.median(times)
                result["mbit_per_second"] = megabytes * 8.388608 / (time.perf_counter() - started)
        dist.barrier()
        return result


def serve(settings: dict) -> None:
    """A rank: obeys lines of stdin and answers on stdout."""
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = Rank(**settings)
    print(json.dumps({"message_bytes": 4 * rank.zeros.numel()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(rank, request.pop("do"))(**request)), flush=True)
    exit_process(0)


class Hosts:
    """The ranks, one in each host of a network."""

    def __init__(self, hosts: list[namespaces.Host], link: namespaces.Link, settings: dict) -> None:
        self.address, self.link, self.ranks = hosts[1].address, link, []
        for rank, host in enumerate(hosts):
            for key, value in TCP.items():
                subprocess.run(host.command("sysctl", "-qw", f"net.ipv4.{key}={value}"), check=True)
            seat = {"RANK": rank, "WORLD_SIZE": len(hosts), "MASTER_ADDR": hosts[0].address}
            seat |= {"MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": namespaces.INTERFACE, "OMP_NUM_THREADS": 1}
            command = host.command(sys.executable, __file__, json.dumps(settings))
            environment = os.environ | {key: str(value) for key, value in seat.items()}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.ranks.append(subprocess.Popen(command, env=environment, **pipes))
        self.message_bytes = self._answers()[0]["message_bytes"]

    def ask(self, do: str, **arguments: object) -> object:
        """Rank 0's answer to what all ranks do."""
        for rank in self.ranks:
            rank.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            rank.stdin.flush()
        return self._answers()[0]

    def close(self) -> None:
        """Ends the ranks."""
        for rank in self.ranks:
            rank.stdin.close()
        for rank in self.ranks:
            try:
                rank.wait(10)
            except subprocess.TimeoutExpired:
                rank.kill()

    def _answers(self) -> list:
        return [json.loads(rank.stdout.readline()) for rank in self.ranks]


@contextmanager
def start_hosts(number: int, **settings: object) -> Iterator[Hosts]:
    """`number` hosts with a rank each, made from `settings` (see `Rank`); ended and removed at the end.

    Raises:
        OSError: this machine cannot have network namespaces; the message says why.
    """
    namespaces.QUEUE_SECONDS = 2.0  # several messages in flight wait for their turn; none is dropped
    with namespaces.hosts(number, mtu=65000) as (made, link):  # large packets: the relay is Python
        ranks = Hosts(made, link, settings)
        try:
            yield ranks
        finally:
            ranks.close()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
