"""Writes the tables of README.md and long_horizon.md, between their markers, from the JSON files of the results.

python benchmarks/paper/tables.py            a test fails if a table and its JSON differ
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.paper import long_horizon_report, resets, shift_error
from benchmarks.paper.long_horizon_report import with_interval
from dist_cts.run.report import interval

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "paper"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
METHODS = {
    "cts": "CTS",
    "no_shifting": "No Shifting",
    "random_shifting": "Random Shifting",
    "reptile": "Reptile",
    "accurate": "Ours Accurate",
    "leap": "Leap",
    "fomaml": "FOMAML",
    "fomaml++": "FOMAML++",
    "imaml": "iMAML",
}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def fig4() -> str:
    grid, fixed = load("fig4")["c"].values()
    ks = ("5", "10", "20", "30", "40", "60", "80", "100")
    rows = [["best of 100² points after k steps", *(f"{grid[k]:.3f}" for k in ks)]]
    return markdown(["k", *ks], [*rows, ["best fixed point of Reptile(k)", *(f"{fixed[k]:.3f}" for k in ks)]])


def fig4d() -> str:
    steps = load("fig4")["d"]["inner_gradient_steps_of_one_task"]
    return markdown(
        ["", *(METHODS[m] for m in steps)], [["gradient steps per task", *(f"{n:,}" for n in steps.values())]]
    )


def fig5() -> str:
    points = load("fig5")["fixed_points"]
    rows = [
        [k, str(row["count"]), f"{min(losses):.2f}", f"{max(losses):.2f}", f"{row['share_of_starts_at_rest']:.0%}"]
        for k, row in points.items()
        if (losses := row["loss_after_100_steps"])
    ]
    head = ["k", "fixed points", "lowest loss", "highest loss", "initializations that come to rest"]
    return markdown(head, rows)


def fig5_paths() -> str:
    paths = load("fig5")["paths"]
    methods = ("reptile", "cts", "accurate")
    rows = [[start, *(f"{paths[start][method]['loss_after_100_steps']:.2f}" for method in methods)] for start in paths]
    return markdown(["from", *(METHODS[method] for method in methods)], rows)


def starts() -> str:
    cost = {  # meta-updates, gradient steps per task
        "start": ("the initialization itself", "0", "0"),
        "reptile, 3 updates": ("Reptile", "3", "300"),
        "reptile, 300 updates": ("Reptile", "300", "30,000"),
        "cts": ("CTS", "300", "300"),
        "no_shifting": ("No Shifting", "300", "300"),
        "accurate": ("Ours Accurate", "300", "15,150"),
    }
    document = load("fig5")["starts_21_x_21"]
    rows = []
    for key, cells in cost.items():
        row = list(cells)
        for state in ("reset_optimizer", "keep_optimizer"):
            share = document[state]["share_below_reptile_300"].get(key)
            row += [f"{document[state]['mean_loss'][key]:.2f}", "" if share is None else f"{share:.0%}"]
        rows.append(row)
    head = ["", "meta-updates", "gradient steps per task"]
    return markdown(
        [*head, *("mean, state reset", "below Reptile (300)", "mean, state kept", "below Reptile (300)")], rows
    )


def figS1() -> str:
    document = load("figS1")
    names = ("momentum", "SGD", "Adam")
    keys = {"mean": "mean_loss_after_100_steps", "median": "median_loss_after_100_steps"}
    return markdown(
        ["", *names], [[row, *(f"{document[name][key]:.2f}" for name in names)] for row, key in keys.items()]
    )


def fig3() -> str:
    document = load("fig3")
    bounds = {"alpha": ("α", "1"), "beta": ("β", "1"), "k": ("k, random directions", "2; 1.5 for a constant Hessian")}
    rows = [
        [name, bound, *(_slope(document[key][activation]) for activation in ("Softplus", "ReLU"))]
        for key, (name, bound) in bounds.items()
    ]
    rows.append(["k, one direction", "2", _slope(document["k"]["Softplus, one direction"]), ""])
    return markdown(["slope of log error in", "bound, first term", "Softplus", "ReLU"], rows)


def fig3_factors() -> str:
    factors = load("fig3")["factor_at_largest_k"]
    names = {
        "ReLU": "ReLU",
        "momentum 0.9": "Softplus, momentum 0.9",
        "weight decay 0.01": "Softplus, weight decay 0.01",
    }
    return markdown(
        ["instead of Softplus, plain SGD", *names], [["factor", *(f"{factors[key]:.3g}" for key in names.values())]]
    )


def short_losses() -> str:
    """Every beta that was tried at K = 100 and the loss there; the loss at the end of a run with the chosen one."""
    document = load("short_horizon_losses")
    rows = []
    for method, curve in document["curves"].items():
        tried = document["tuning"][f"{method}, K=100"]["losses"]
        chosen = document["beta"][f"{method}, K=100"]
        cells = [
            f"**{beta}: {loss:.3f}**" if float(beta) == chosen else f"{beta}: {loss:.3f}"
            for beta, loss in tried.items()
        ]
        rows.append([METHODS[method], ", ".join(cells), f"{curve['loss'][-1]:.2f}"])
    return markdown(
        ["", "β: loss after 300 steps per task, one seed", "loss after 900 steps per task"],
        sorted(rows, key=lambda row: row[2]),
    )


def short_contrasts() -> str:
    """CTS minus the others at K = 100, paired by the meta-training seed."""
    runs = load("short_horizon_meta_test")["runs"]
    targets = list(next(iter(runs.values())))

    def accuracies(method: str, target: str) -> list[float]:
        return [row[target]["accuracy"] for name, row in runs.items() if name.startswith(f"{method}-K100-")]

    rows = []
    for method in ("reptile", "no_shifting", "random_shifting"):
        row = [f"CTS − {METHODS[method]}"]
        for target in targets:
            pairs = zip(accuracies("cts", target), accuracies(method, target), strict=True)
            mean, half = interval([ours - theirs for ours, theirs in pairs])
            row.append(f"{mean:.1f} ± {half:.1f}")
        rows.append(row)
    return markdown(["points", *targets], rows)


def short_methods() -> str:
    """Accuracy of meta-training seed 0, mean over three meta-test seeds, by method and K."""
    runs = load("short_horizon_meta_test")["runs"]
    targets = list(next(iter(runs.values())))
    found: dict[str, dict[str, list[str]]] = {}
    for name, row in runs.items():
        method, _, K = name.partition("-beta")[0].rpartition("-K")
        if name.endswith("-seed0-steps900"):
            found.setdefault(method, {})[K] = [f"{row[target]['accuracy']:.1f}" for target in targets]
    horizons = ("10", "30", "100")
    labels = METHODS | {"mtl": "MTL", "single": "one source task"}
    rows = [
        [labels[method], *(" / ".join(cells[K]) if K in cells else "" for K in horizons)]
        for method, cells in sorted(found.items(), key=lambda item: list(labels).index(item[0]))
    ]
    return markdown([f"{' / '.join(targets)}, %", *(f"K = {K}" for K in horizons)], rows)


def episode() -> str:
    """The curves of Figure `shift_error`: means over tasks and seeds."""
    runs = shift_error.read(RESULTS / "shift_error.json")
    rows = []
    labels = {"error": "error", "cosine": "cosine", "length": "length of Δ", "distance": "distance", "loss": "loss"}
    for beta, number in sorted(shift_error.measured(runs), key=lambda pair: (pair[0] != 0.01, pair[1])):
        for quantity, label in labels.items():
            for method in shift_error.METHODS:
                found = shift_error.values(runs, method, beta, number, quantity)
                if len(found):
                    where = f"{label}, episode {number}, β = {beta:g}"
                    means = [f"{round(value, 2) + 0.0:.2f}" for value in found.mean(0)]  # no -0.00
                    rows.append([where, METHODS[method], str(len(found)), *means])
    return markdown(["", "method", "seeds", *(f"k = {k}" for k in shift_error.KS)], rows)


def what_is_reset() -> str:
    """CTS with each choice of resets.py, and its difference to resetting nothing, paired by seed."""
    found = resets.accuracies(resets.FOLDER)
    rows = []
    for choice, accuracy in found.items():
        differences = [accuracy[seed] - found["nothing"][seed] for seed in accuracy]
        cells = [with_interval(*interval(values)) for values in (list(accuracy.values()), differences)]
        rows.append([choice, str(len(accuracy)), cells[0], cells[1] if choice != "nothing" else ""])
    return markdown(["reset besides θ", "seeds", "four targets, %", "minus nothing, points"], rows)


def small_beta() -> str:
    """log10 of the error at each beta."""
    document = load("fig3_small_beta")
    rows = [
        [name, str(len(errors)), *(with_interval(*interval(list(column)), 2) for column in zip(*errors, strict=True))]
        for name, errors in document["log10_errors"].items()
    ]
    return markdown(["log10 of the error", "draws", *(f"β = {beta:g}" for beta in document["settings"]["betas"])], rows)


def _slope(line: dict) -> str:
    return f"{line['slope']:.2f} ± {line['slope_ci95']:.2f}"


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        fig3,
        fig3_factors,
        fig4,
        fig4d,
        fig5,
        fig5_paths,
        starts,
        figS1,
        short_losses,
        short_contrasts,
        short_methods,
        episode,
        what_is_reset,
        small_beta,
    )
}


def study(name: str) -> str:
    """A table of the long-horizon study."""
    records = long_horizon_report.read(long_horizon_report.FOLDER)
    head, *rows = long_horizon_report.TABLES[name](records)
    return markdown(head, rows) if rows else "No run yet.\n"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": TABLES,
    "long_horizon.md": {name: partial(study, name) for name in long_horizon_report.TABLES},
}


def rendered(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A page with each of its tables made from the JSON files.

    Raises:
        KeyError: a marker names no table.
    """
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]]()}{match[3]}", text)


def main() -> None:
    for name, tables in PAGES.items():
        page = HERE / name
        page.write_text(rendered(page.read_text(), tables))


if __name__ == "__main__":
    main()
