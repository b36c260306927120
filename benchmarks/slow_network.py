"""A step over slow links, by method and delay: hosts are network namespaces of this machine; see --help."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import learners, namespaces, report, scaling
from dist_cts.distributed.malloc import keep_freed_memory
from dist_cts.learner import TaskLearner
from dist_cts.run.exit_codes import exit_process

EPILOG = """\
One rank per host, one thread per rank, all with the same model, images and batch size:
  cts D     CTS with method.delay=D
  reptile   within an episode: it exchanges the control tail every ten steps
  ddp       plain PyTorch under DistributedDataParallel
  sgd       plain PyTorch, nothing exchanged
Every condition is calibrated by a ping and a transfer over TCP. The methods take turns; a step is the mean over a block
of steps that begins once as many are in flight as will be, on the slowest rank. `hiccup`: rank 1 sleeps for 50 ms at
every tenth step; `in turn`: each rank does, at different steps.
The hosts' cores, and the CPU that carries their packets, are this machine's: more hosts than cores share them. With
--sleep-ms, a rank sleeps instead of computing loss and gradient, as a host does whose GPU computes; ddp is left out.

  python benchmarks/slow_network.py --hosts 2 --model resnet20 --batch-size 32
  python benchmarks/slow_network.py --hosts 4 --model resnet18 --batch-size 1 --pixels 8 --sleep-ms 200
"""
DELAYS = (0, 1, 2, 4, 8)
PORT = 5001
TCP = {"tcp_rmem": "4096 16777216 67108864", "tcp_wmem": "4096 16777216 67108864", "tcp_slow_start_after_idle": "0"}
SLEEP, EVERY = 0.05, 10  # a straggler's seconds, and steps


class Rank:
    """One rank's competitors; the coordinator says over stdin what to do."""

    def __init__(self, model: str, batch_size: int, pixels: int, sleep_ms: float) -> None:
        noise, world_size = learners.Noise(torch.device("cpu"), pixels=pixels), dist.get_world_size()

        def learner() -> TaskLearner:
            made = learners.make_learner(noise, model, batch_size)
            if sleep_ms:
                made.compute_gradient = lambda batch: (time.sleep(sleep_ms / 1e3), made.loss, made.loss)[1:]
            return made

        self.steps: dict[str, Callable[[], object]] = {}
        self.ahead: dict[str, int] = {}
        for delay in DELAYS:
            cts = learners.MetaTraining([learner()], world_size, delay=delay)
            self.steps[f"cts {delay}"], self.ahead[f"cts {delay}"] = cts.step, delay
            self.reducer = cts.reducer
        self.steps["reptile"] = learners.MetaTraining([learner()], world_size, algorithm="reptile").step
        if not sleep_ms:
            ddp = learners.PlainTask(noise, model, batch_size)
            ddp.model = DistributedDataParallel(ddp.model, gradient_as_bucket_view=True, broadcast_buffers=False)
            self.steps["ddp"] = ddp.step
        self.steps["sgd"] = learner().inner_step if sleep_ms else learners.PlainTask(noise, model, batch_size).step
        self.taken = 0
        self.zeros = torch.zeros(self.reducer.message_numel)

    def block(self, name: str, steps: int, straggler: str = "") -> tuple[float, float]:
        """Seconds per step over a block, on the slowest rank, and CPU seconds, the mean over the ranks."""
        step = self.steps[name]
        dist.barrier()
        for _ in range(4 * self.ahead.get(name, 0) + 2):  # until as many are in flight as will be
            step()
        started, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.taken += 1
            late = {"": (), "hiccup": (1,), "in turn": (self.taken // EVERY % dist.get_world_size(),)}[straggler]
            if self.taken % EVERY == 0 and dist.get_rank() in late:
                time.sleep(SLEEP)
            step()
        seconds = torch.tensor((time.perf_counter() - started) / steps)
        cpu = torch.tensor((time.process_time() - used) / steps / dist.get_world_size())
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        dist.all_reduce(cpu)
        return seconds.item(), cpu.item()

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
    rank = Rank(*(settings[name] for name in ("model", "batch_size", "pixels", "sleep_ms")))
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
            command = host.command(sys.executable, __file__, "--rank", json.dumps(settings))
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
def start_hosts(settings: dict) -> Iterator[Hosts]:
    """The ranks on their hosts; ended and removed at the end.

    Raises:
        OSError: this machine cannot have network namespaces; the message says why.
    """
    with namespaces.hosts(settings["hosts"], mtu=65000) as (made, link):  # large packets: the relay is Python
        ranks = Hosts(made, link, settings)
        try:
            yield ranks
        finally:
            ranks.close()


def measure(hosts: Hosts, milliseconds: float, megabits: int | None, methods: list[str], args) -> dict:
    """Calibration and seconds per step of every method, a value per round, in one condition."""
    hosts.link.delay_ms, hosts.link.rate_mbit = milliseconds, megabits or 0
    megabytes = min(64, megabits // 20) if megabits else 64
    result = {"delay_ms": milliseconds, "mbit": megabits}
    result |= {part: {name: [] for name in methods} for part in ("seconds", "cpu_seconds")}
    result["calibration"] = hosts.ask("ping", address=hosts.address, megabytes=megabytes)
    hosts.ask("all_reduce", rounds=2)
    result["all_reduce"] = hosts.ask("all_reduce", rounds=5)
    relayed, dropped = hosts.link.packets, hosts.link.dropped
    for number in range(args.rounds):
        for name in methods[:: 1 if number % 2 else -1]:
            for part, value in zip(
                ("seconds", "cpu_seconds"), hosts.ask("block", name=name, steps=args.steps), strict=True
            ):
                result[part][name].append(value)
    result |= {"packets": hosts.link.packets - relayed, "dropped": hosts.link.dropped - dropped}
    return result


def stragglers(hosts: Hosts, args) -> list[dict]:
    """CTS with stragglers, at 5 ms without limit: seconds per step."""
    hosts.link.delay_ms, hosts.link.rate_mbit = 5, 0
    names, rows = ["cts 0", "cts 1", "cts 2", "cts 4", "cts 8", "sgd"], []
    kinds = ("", "hiccup", "in turn")
    seconds = {name: {kind: [] for kind in kinds} for name in names}
    for _ in range(args.rounds):
        for name in names:
            for kind in kinds:
                steps = max(2, len(hosts.ranks)) * EVERY
                seconds[name][kind].append(hosts.ask("block", name=name, steps=steps, straggler=kind)[0])
    for name, by_kind in seconds.items():
        rows.append({"step": name} | {kind or "none": by_kind[kind] for kind in kinds})
    return rows


def plot(conditions: list[dict], title: str, path: Path) -> None:
    """Step time against latency, a panel per rate."""
    import matplotlib.pyplot as plt

    rates = list(dict.fromkeys(condition["mbit"] for condition in conditions))
    figure, axes = plt.subplots(1, len(rates), figsize=(4 * len(rates), 3.6), layout="constrained", squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        own = [condition for condition in conditions if condition["mbit"] == rate]
        for name in own[0]["seconds"]:
            points = [1e3 * statistics.median(condition["seconds"][name]) for condition in own]
            style = {"sgd": "k--", "ddp": "s-", "reptile": "^-"}.get(name, "o-")
            axis.plot([condition["delay_ms"] for condition in own], points, style, label=name, markersize=4)
        axis.set(xlabel="one-way delay, ms", ylabel="ms per step", ylim=(0, None))
        axis.set_title(f"{rate} Mbit/s" if rate else "no rate limit", fontsize=10)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--sleep-ms", type=float, default=0, help="sleep so long instead of computing, as with a GPU")
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0, 1, 5, 20, 50], help="one way")
    parser.add_argument("--mbit", type=int, nargs="+", default=[0, 1000, 100], help="rates; 0: no limit")
    parser.add_argument("--steps", type=int, default=10, help="of a block (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="of the list above, such as `cts 4` (default: all)")
    parser.add_argument(
        "--keep", type=Path, help="file of the conditions measured so far, to go on after an interruption"
    )
    parser.add_argument("--stragglers", action="store_true", help="measure stragglers too")
    parser.add_argument("--rank", help="internal: the settings of a rank")
    args = parser.parse_args(arguments)
    if args.rank:
        serve(json.loads(args.rank))
    if args.quick:
        args.model, args.batch_size, args.pixels, args.steps, args.rounds = "tiny", 4, 8, 2, 1
        args.delays_ms, args.mbit, args.stragglers = [0, 5], [0, 100], True
    methods = args.methods or [
        *(f"cts {delay}" for delay in DELAYS),
        "reptile",
        *([] if args.sleep_ms else ["ddp"]),
        "sgd",
    ]
    settings = {
        name: getattr(args, name) for name in ("hosts", "model", "batch_size", "pixels", "sleep_ms", "steps", "rounds")
    }
    namespaces.QUEUE_SECONDS = 2.0  # several messages in flight wait for their turn; none is dropped
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(start_hosts(settings))
        except OSError as error:
            print(f"skipped: {error}")
            return
        kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
        wanted = {
            f"{delay:g} ms, {rate} Mbit/s": (delay, rate or None) for rate in args.mbit for delay in args.delays_ms
        }
        for name, condition in wanted.items():
            if name not in kept:
                kept[name] = measure(hosts, *condition, methods, args)
                print(summary(kept[name]), file=sys.stderr, flush=True)
                if args.keep:
                    args.keep.write_text(json.dumps(kept))
        conditions = [kept[name] for name in wanted]
        late = stragglers(hosts, args) if args.stragglers else []
    rows = table_rows(conditions, hosts.message_bytes, args.hosts, args.sleep_ms > 0)
    for row in late:
        shown = {
            key: report.shown(report.spread([1e3 * v for v in value])) for key, value in row.items() if key != "step"
        }
        print(report.table([{"stragglers, ms": row["step"], **shown}]))
    settings |= {"message_bytes": hosts.message_bytes}
    results = {"settings": settings, "conditions": conditions, "stragglers": late}
    name = f"slow-network-{args.model}-{args.hosts}{'-asleep' if args.sleep_ms else ''}"
    report.publish(name, results, rows, args, world_size=args.hosts)
    if args.out or not args.quick:
        computing = f"{args.sleep_ms:g} ms asleep" if args.sleep_ms else f"batch {args.batch_size}"
        title = f"{args.model}, {computing}, {args.hosts} hosts"
        plot(conditions, title, (args.out or report.RESULTS) / f"{time.strftime('%F')}-{name}.png")


def table_rows(conditions: list[dict], message_bytes: int, hosts: int, asleep: bool) -> list[dict[str, object]]:
    """A row per condition and method: ms per step, its ratio to sgd, and what the model of scaling.py says.

    The model's computation is `cts 0` without its all-reduce in the first condition. Unless the ranks are `asleep`, a
    delay does not hide the all-reduce's CPU time, what it takes in the first condition: gloo's threads share the core.
    """
    rows, first = [], conditions[0]
    alone = statistics.median(first["seconds"]["cts 0"]) - first["all_reduce"]
    for condition in conditions:
        rate = condition["mbit"] or condition["calibration"]["mbit_per_second"]
        wire = 2 * (hosts - 1) / hosts * message_bytes * 8e-6 / rate
        for name, seconds in condition["seconds"].items():
            row = {"one way, ms": condition["delay_ms"], "Mbit/s": condition["mbit"] or "-", "step": name}
            row["ms"] = report.shown(report.spread([1e3 * value for value in seconds]))
            row["CPU ms"] = 1e3 * statistics.median(condition["cpu_seconds"][name])
            row["/ sgd"] = report.shown(report.ratio(seconds, condition["seconds"]["sgd"]))
            row["model, ms"] = row["model / measured"] = "-"
            kind, _, delay = name.partition(" ")
            if kind == "cts":
                compute = alone + first["all_reduce"] * (delay != "0" and not asleep)
                model = scaling.delayed_step(compute, condition["all_reduce"], wire, int(delay))
                row["model, ms"], row["model / measured"] = 1e3 * model, model / statistics.median(seconds)
            rows.append(row)
    return rows


def summary(condition: dict) -> str:
    """A line about a condition."""
    medians = {name: f"{1e3 * statistics.median(values):.1f}" for name, values in condition["seconds"].items()}
    return f"{condition['delay_ms']:g} ms, {condition['mbit'] or 'no limit'}: {condition['calibration']} {medians}"


if __name__ == "__main__":
    main()
