"""The long-horizon study's finished runs: endpoint, contrasts, slopes, and the tables of long_horizon.md."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.paper.figures import BLUE, GREEN, ORANGE, PURPLE, RED, RESULTS
from benchmarks.paper.long_horizon_runs import shown
from dist_cts.run.report import interval

FOLDER = RESULTS / "long_horizon"
CONTROL = "tiny-imagenet-160-180"  # not in any contrast
MAIN_K = 1000
COMPARED = ("cts", "reptile", "no_shifting", "random_shifting")
ONCE = ("reptile", "leap", "fomaml", "fomaml++", "imaml")  # these update phi once per episode
CONTRASTS = ("reptile", "no_shifting", "random_shifting", "mtl", "single-tiny-imagenet-0-20")  # CTS minus these
LOOKS = {
    "cts": ("CTS", BLUE),
    "reptile": ("Reptile", RED),
    "no_shifting": ("No Shifting", GREEN),
    "random_shifting": ("Random Shifting", PURPLE),
    "leap": ("Leap", ORANGE),
    "fomaml": ("FOMAML", "#F0E442"),
    "fomaml++": ("FOMAML++", "#B8A000"),
    "imaml": ("iMAML", "#8C564B"),
    "mtl": ("MTL", "#555555"),
    "single-tiny-imagenet-0-20": ("TinyImageNet alone", "#777777"),
    "single-fashion-mnist": ("Fashion-MNIST alone", "#AAAAAA"),
    "random": ("random initialization", "#CCCCCC"),
}
Cell = tuple[str, int]  # method, K
Value = Callable[[Mapping[str, Sequence[float]]], float]  # of accuracies in % by target and meta-test seed


@dataclass
class Records:
    """The finished runs: main ones by (method, K) and seed, tuning ones by (method, K), setting and seed."""

    main: dict[Cell, dict[int, dict]] = field(default_factory=lambda: defaultdict(dict))
    tune: dict[Cell, dict[tuple[float, str], dict[int, dict]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    random: dict | None = None


def read(folder: Path) -> Records:
    records = Records()
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if path.stem == "random":
            records.random = record
        if (run := record.get("run")) is None:
            continue
        cell = run["method"], run["K"]
        if run["kind"] == "main":
            records.main[cell][run["seed"]] = record
        elif run["kind"] == "tune":
            options = ", ".join(map(shown, run.get("options", ())))
            records.tune[cell][run["beta"], options][run["seed"]] = record
    return records


def endpoint(accuracy: Mapping[str, Sequence[float]]) -> float:
    """The protocol's: mean accuracy in % over the four targets and the meta-test's seeds."""
    return float(np.mean([np.mean(seeds) for target, seeds in accuracy.items() if target != CONTROL]))


def control(accuracy: Mapping[str, Sequence[float]]) -> float:
    """Mean accuracy in % on unseen classes of a meta-training task."""
    return float(np.mean(accuracy[CONTROL]))


def endpoints(records: Records, cell: Cell, value: Value = endpoint) -> dict[int, float]:
    """Endpoint, or another `value`, by seed; diverged runs are left out."""
    runs = records.main.get(cell, {})
    return {seed: value(record["accuracy"]) for seed, record in runs.items() if "accuracy" in record}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979), in the given order."""
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def contrasts(records: Records) -> dict[str, dict[str, float]]:
    """CTS minus each other method at K = 1000, over the seeds that both have: mean, 95 % interval, Holm-adjusted p."""
    ours, found = endpoints(records, ("cts", MAIN_K)), {}
    for method in CONTRASTS:
        theirs = endpoints(records, (method, MAIN_K))
        differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        if len(differences) > 1:
            mean, half = interval(differences)
            p = float(stats.ttest_1samp(differences, 0.0).pvalue)
            found[method] = {"seeds": len(differences), "mean": mean, "ci95": half, "p": p}
    for row, p in zip(found.values(), holm([row["p"] for row in found.values()]), strict=True):
        row["p_holm"] = p
    return found


def slopes(records: Records) -> dict[str, tuple[float, float, int]]:
    """For each method: slope of the endpoint over log10 K, in points per decade; mean and half width over seeds."""
    found = {}
    for method in COMPARED:
        horizons = sorted(K for name, K in records.main if name == method)
        by_K = {K: endpoints(records, (method, K)) for K in horizons}
        seeds = set.intersection(*map(set, by_K.values())) if len(horizons) > 1 else set()
        fits = [np.polyfit(np.log10(horizons), [by_K[K][seed] for K in horizons], 1)[0] for seed in sorted(seeds)]
        if fits:
            found[method] = (*interval(fits), len(fits))
    return found


def meta_updates(record: dict) -> int:
    """Updates of phi in the whole run."""
    training = record["request"]["training"]
    steps = training["episodes"] * training["inner_steps"]
    return training["episodes"] if training["algorithm"] in ONCE else steps


# ---------------------------------------------------------------- tables of long_horizon.md


def with_interval(mean: float, half: float, digits: int = 1) -> str:
    """mean ± half, without the half if there is a single value."""
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def table_progress(records: Records) -> Iterable[Sequence[str]]:
    """Finished runs."""
    yield "", "finished", "of"
    yield (
        "runs that tune β",
        str(sum(len(seeds) for tried in records.tune.values() for seeds in tried.values())),
        "about 180",
    )
    yield "main runs", str(sum(map(len, records.main.values()))), "69"


def table_beta(records: Records) -> Iterable[Sequence[str]]:
    """Every beta that was tried."""
    yield "method, K", "β: validation accuracy in % (seed 100; seed 101)"
    for (method, K), tried in sorted(
        records.tune.items(), key=lambda item: (-item[0][1], list(LOOKS).index(item[0][0]))
    ):
        cells = []
        for (beta, options), seeds in sorted(tried.items()):
            values = [
                f"{np.mean(list(record['accuracy'].values())):.1f}" if "accuracy" in record else "diverged"
                for _, record in sorted(seeds.items())
            ]
            cells.append(f"{beta:g}{options and f' ({options})'}: {'; '.join(values)}")
        yield f"{LOOKS[method][0]}, {K}", " · ".join(cells)


def table_endpoint(records: Records) -> Iterable[Sequence[str]]:
    """The endpoint of every method and K."""
    yield "method", "K", "β", "meta-updates", "seeds", "four targets, %", "TinyImageNet's classes, %"
    if records.random is not None:
        accuracy = records.random["accuracy"]
        yield LOOKS["random"][0], "", "", "0", "", f"{endpoint(accuracy):.1f}", f"{control(accuracy):.1f}"
    for (method, K), runs in sorted(
        records.main.items(), key=lambda item: (-item[0][1], list(LOOKS).index(item[0][0]))
    ):
        columns = [list(endpoints(records, (method, K), value).values()) for value in (endpoint, control)]
        first = next(iter(runs.values()))
        shown = [with_interval(*interval(column)) if column else "diverged" for column in columns]
        beta = f"{first['run']['beta']:g}" if method in (*COMPARED, *ONCE) else ""
        yield LOOKS[method][0], str(K), beta, f"{meta_updates(first):,}", str(len(columns[0])), *shown


def table_contrasts(records: Records) -> Iterable[Sequence[str]]:
    """The five contrasts."""
    yield "CTS minus", "seeds", "points", "p", "p, Holm"
    for method, row in contrasts(records).items():
        yield (
            LOOKS[method][0],
            str(row["seeds"]),
            with_interval(row["mean"], row["ci95"]),
            f"{row['p']:.3f}",
            f"{row['p_holm']:.3f}",
        )


def table_slopes(records: Records) -> Iterable[Sequence[str]]:
    """The dependence on K."""
    yield "method", "seeds", "points per decade of K"
    for method, (mean, half, seeds) in slopes(records).items():
        yield LOOKS[method][0], str(seeds), with_interval(mean, half)


TABLES: dict[str, Callable[[Records], Iterable[Sequence[str]]]] = {
    "progress": table_progress,
    "beta": table_beta,
    "endpoint": table_endpoint,
    "contrasts": table_contrasts,
    "slopes": table_slopes,
}
