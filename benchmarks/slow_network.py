"""A step over slow links, by method and delay: hosts are network namespaces of this machine; see --help."""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import report
from benchmarks.delay_model import delayed_step, ring
from benchmarks.slow_hosts import EVERY, SLEEP, Hosts, start_hosts

EPILOG = f"""\
One rank per host, one thread per rank, all with the same model, images and batch size:
  cts D     CTS with method.delay=D; `cts D bf16`: with wire=bf16
  reptile   within an episode: it exchanges the control tail every ten steps
  ddp       plain PyTorch under DistributedDataParallel
  sgd       plain PyTorch, nothing exchanged
Every condition is calibrated by a ping and a transfer over TCP. The methods take turns; a step is the mean over a block
of steps that begins once as many are in flight as will be, on the slowest rank. Stragglers, at 5 ms without a rate
limit: `one`: rank 1 sleeps for {1e3 * SLEEP:g} ms at every {EVERY}th step; `each`: every rank does, at its own steps.
The hosts' cores, and the CPU that carries their packets, are this machine's: more hosts than cores share them. With
--sleep-ms, a rank sleeps instead of computing loss and gradient, as a host does whose GPU computes; ddp is left out.

  python benchmarks/slow_network.py --hosts 2 --model resnet20 --batch-size 128
  python benchmarks/slow_network.py --hosts 4 --model resnet18 --batch-size 1 --pixels 8 --sleep-ms 200
  python benchmarks/slow_network.py --hosts 4 --model tiny --batch-size 1 --pixels 8 --sleep-ms 60 --stragglers
"""
DELAYS = (0, 1, 2, 4, 8)


def measure(hosts: Hosts, milliseconds: float, megabits: int | None, methods: list[str], args) -> dict:
    """Calibration and seconds per step of every method, a value per round, in one condition."""
    hosts.link.delay_ms, hosts.link.rate_mbit = milliseconds, megabits or 0
    megabytes = min(64, megabits // 20) if megabits else 64
    result = {"delay_ms": milliseconds, "mbit": megabits}
    result |= {part: {name: [] for name in methods} for part in ("seconds", "cpu_seconds", "relay_seconds")}
    result["calibration"] = hosts.ask("ping", address=hosts.address, megabytes=megabytes)
    hosts.ask("all_reduce", rounds=2)
    result["all_reduce"] = hosts.ask("all_reduce", rounds=5)
    relayed, dropped = hosts.link.packets, hosts.link.dropped
    for number in range(args.rounds):
        for name in methods[:: 1 if number % 2 else -1]:
            used = time.process_time()  # of this process, which does nothing but relay
            block = hosts.ask("block", name=name, steps=args.steps)
            block["relay_seconds"] = (time.process_time() - used) / block["steps"]
            for part in ("seconds", "cpu_seconds", "relay_seconds"):
                result[part][name].append(block[part])
    result |= {"packets": hosts.link.packets - relayed, "dropped": hosts.link.dropped - dropped}
    return result


def stragglers(hosts: Hosts, methods: list[str], rounds: int) -> list[dict]:
    """Seconds per step of every method without stragglers, with one, and with each rank being one."""
    hosts.link.delay_ms, hosts.link.rate_mbit = 5, 0
    kinds = ("none", "one", "each")
    seconds = {name: {kind: [] for kind in kinds} for name in methods}
    for number in range(rounds):
        for name in methods[:: 1 if number % 2 else -1]:
            for kind in kinds[:: 1 if number % 2 else -1]:
                seconds[name][kind].append(hosts.ask("block", name=name, steps=4 * EVERY, straggler=kind)["seconds"])
    return [{"step": name} | by_kind for name, by_kind in seconds.items()]


def plot(conditions: list[dict], title: str, path: Path) -> None:
    """Step time against latency, a panel per rate."""
    import matplotlib.pyplot as plt

    rates = list(dict.fromkeys(condition["mbit"] for condition in conditions))
    figure, axes = plt.subplots(1, len(rates), figsize=(4 * len(rates) + 1, 3.6), layout="constrained", squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        own = [condition for condition in conditions if condition["mbit"] == rate]
        for name in own[0]["seconds"]:
            points = [1e3 * statistics.median(condition["seconds"][name]) for condition in own]
            style = {"sgd": "k--", "ddp": "s-", "reptile": "^-"}.get(name, "o-")
            axis.plot([condition["delay_ms"] for condition in own], points, style, label=name, markersize=4)
        axis.set(xlabel="one-way delay, ms", ylabel="ms per step", ylim=(0, None))
        axis.set_title(f"{rate} Mbit/s" if rate else "no rate limit", fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `methods` is filled in."""
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
    parser.add_argument("--keep", type=Path, help="file of what has been measured, to resume after an interruption")
    parser.add_argument("--stragglers", action="store_true", help="measure stragglers, and no other condition")
    args = parser.parse_args(arguments)
    if args.quick:
        args.model, args.batch_size, args.pixels, args.steps, args.rounds = "tiny", 4, 8, 2, 1
        args.delays_ms, args.mbit = [0, 5], [0, 100]
    delays = [f"cts {delay}" for delay in DELAYS]
    others = ["sgd"] if args.stragglers else ["reptile", *([] if args.sleep_ms else ["ddp"]), "sgd"]
    args.methods = args.methods or [*delays, *others]
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    computing = {name: getattr(args, name) for name in ("methods", "model", "batch_size", "pixels", "sleep_ms")}
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(start_hosts(args.hosts, **computing))
        except OSError as error:
            print(f"skipped: {error}")
            return
        settings = computing | {"hosts": args.hosts, "steps": args.steps, "rounds": args.rounds}
        settings["message_bytes"] = hosts.message_bytes
        name = f"{args.model}-{args.hosts}{'-asleep' if args.sleep_ms else ''}"
        if args.stragglers:
            late = stragglers(hosts, args.methods, args.rounds)
            results = {"settings": settings, "stragglers": late}
            rows = [{key: in_ms(value) if key != "step" else value for key, value in row.items()} for row in late]
            return report.publish(f"stragglers-{name}", results, rows, args, world_size=args.hosts)
        kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
        wanted = {
            f"{delay:g} ms, {rate} Mbit/s": (delay, rate or None) for rate in args.mbit for delay in args.delays_ms
        }
        for title, condition in wanted.items():
            if title not in kept:
                kept[title] = measure(hosts, *condition, args.methods, args)
                print(summary(kept[title]), file=sys.stderr, flush=True)
                if args.keep:
                    args.keep.write_text(json.dumps(kept))
    conditions = [kept[title] for title in wanted]
    rows = table_rows(conditions, hosts.message_bytes, args.hosts)
    results = {"settings": settings, "conditions": conditions}
    report.publish(f"slow-network-{name}", results, rows, args, world_size=args.hosts)
    if args.out or not args.quick:
        work = f"{args.sleep_ms:g} ms asleep" if args.sleep_ms else f"batch {args.batch_size}"
        path = (args.out or report.RESULTS) / f"{time.strftime('%F')}-slow-network-{name}.png"
        plot(conditions, f"{args.model}, {work}, {args.hosts} hosts", path)


def table_rows(conditions: list[dict], message_bytes: int, hosts: int) -> list[dict[str, object]]:
    """A row per condition and method: ms per step, CPU, the ratio to sgd, and what the model of delay_model.py says.

    The model takes three figures from the first condition: the all-reduce, which is CPU time there; the computation,
    `cts 0` without it; and for d > 0, where the all-reduce's CPU time is not hidden, the step with the longest delay.
    """
    rows, first = [], conditions[0]
    steps = {name: statistics.median(values) for name, values in first["seconds"].items() if name.startswith("cts")}
    alone, hidden = steps["cts 0"] - first["all_reduce"], list(steps.values())[-1]
    for condition in conditions:
        wire = 8e-6 * message_bytes / condition["mbit"] if condition["mbit"] else 0.0
        for name, seconds in condition["seconds"].items():
            row = {"one way, ms": condition["delay_ms"], "Mbit/s": condition["mbit"] or "-", "step": name}
            row |= {"ms": in_ms(seconds), "CPU ms": 1e3 * statistics.median(condition["cpu_seconds"][name])}
            row["relay's CPU ms"] = 1e3 * statistics.median(condition["relay_seconds"][name])
            row["/ sgd"] = report.shown(report.ratio(seconds, condition["seconds"]["sgd"]))
            row["model, ms"] = row["model / measured"] = "-"
            kind, *options = name.split()
            if kind == "cts":
                delay, share = int(options[0]), 0.5 if "bf16" in options else 1
                size = round(share * message_bytes)
                sends = ring(hosts, size, condition["delay_ms"] / 1e3, share * wire, overhead=first["all_reduce"])
                model = delayed_step(hidden if delay else alone, sends, delay)
                row["model, ms"], row["model / measured"] = 1e3 * model, model / statistics.median(seconds)
            rows.append(row)
    return rows


def in_ms(seconds: list[float]) -> str:
    """Median and range for a table."""
    return report.shown(report.spread([1e3 * value for value in seconds]))


def summary(condition: dict) -> str:
    """A line about a condition."""
    medians = {name: f"{1e3 * statistics.median(values):.1f}" for name, values in condition["seconds"].items()}
    return f"{condition['delay_ms']:g} ms, {condition['mbit'] or 'no limit'}: {condition['calibration']} {medians}"


if __name__ == "__main__":
    main()
