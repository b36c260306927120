"""Every measured number in README, docs/ and benchmarks/paper is one that a JSON file gives, in its sentence."""

import json
import re
from functools import cache
from statistics import mean, median

import pytest

from benchmarks.paper import shift_error, tables
from benchmarks.report import RESULTS, ratio
from tests.helpers.commands import ROOT

# Numbers that were not measured: versions, settings, formulas.
SETTINGS = {
    "README.md": "3.11 3.13 2.0",
    "docs/paper.md": "4.1 4.2 200,000",
    "docs/reliability.md": "",
    "benchmarks/paper/README.md": "0.001 0.01 0.05 0.1 0.9 1.5 3.3 3.4 7,200 200,000",
}
SECTIONS = {"docs/paper.md": "## What is reproduced", "docs/reliability.md": "## Evidence"}  # from here on


@cache
def load(name):
    """A JSON file: paper/NAME, or the newest DATE-NAME."""
    path = RESULTS / f"{name}.json" if "/" in name else sorted(RESULTS.glob(f"*-{name}.json"))[-1]
    record = json.loads(path.read_text())
    return record["results"] if "command" in record else record


def cell(summary, bold=False):
    text = f"{summary['accuracy']:.2f} ± {summary['ci95']:.2f}"
    return f"**{text}**" if bold else text


def contrast(method):
    """CTS minus a method at K = 100 on both targets, as the table of benchmarks/paper has it."""
    (row,) = [line for line in tables.short_contrasts().splitlines() if f"CTS − {tables.METHODS[method]} " in line]
    return " and ".join(part.strip() for part in row.split("|")[2:4])


def unseen_classes(method):
    """Accuracy on TinyImageNet's unseen classes at K = 100, mean over the meta-training seeds."""
    runs = load("paper/short_horizon_meta_test")["runs"]
    return mean(
        row["tiny-imagenet-160-200"]["accuracy"] for name, row in runs.items() if name.startswith(f"{method}-K100-")
    )


def final_loss(method):
    return f"{load('paper/short_horizon_losses')['curves'][method]['loss'][-1]:.2f}"


def step_ratio(case, other):
    seconds = load("step-time").get("cases", load("step-time"))[case]["seconds_per_step"]
    return f"{ratio(seconds['cts'], seconds[other])['median']:.2f}"


def loader_ratio():
    found = load("loader")["augmented"]
    rates = {
        name: [found[name]["batches"] / seconds for seconds in found[name]["seconds"]] for name in ("streamed", "ffcv")
    }
    return f"{ratio(rates['streamed'], rates['ffcv'])['median']:.2f}"


def synthetic():
    """Values of Figures 4, 5 and S1 that several pages give."""
    fig4, fig5, figS1 = (load(f"paper/{name}") for name in ("fig4", "fig5", "figS1"))
    ends = [
        [f"{path[method]['loss_after_100_steps']:.2f}" for path in fig5["paths"].values()]
        for method in ("cts", "reptile")
    ]
    steps = {name: f"{count:,}" for name, count in fig4["d"]["inner_gradient_steps_of_one_task"].items()}
    starts = fig5["starts_21_x_21"]["keep_optimizer"]
    means = {name: f"{loss:.2f}" for name, loss in starts["mean_loss"].items()}
    count = starts["starts"] - len(starts["starts_left_out"])
    optimizers = {name: f"{figS1[name]['mean_loss_after_100_steps']:.2f}" for name in ("momentum", "SGD", "Adam")}
    return ends, steps, means, count, optimizers


def at_the_end(quantity):
    """Of CTS and No Shifting after K = 1000 steps of an episode."""
    runs = shift_error.read(RESULTS / "paper" / "shift_error.json")
    methods = ("cts", "no_shifting")
    return [f"{shift_error.values(runs, name, 0.01, 1, quantity).mean(0)[-1]:.2f}" for name in methods]


def readme():
    (cts, reptile), steps, means, count, optimizers = synthetic()
    demo = load("demo")["summary"]
    yield f"a loss of {cts[0]} and {cts[1]} with {steps['cts']} gradient steps per task"
    yield f"Reptile {reptile[0]} and {reptile[1]} with {steps['reptile']}"
    yield f"over {count} initializations: {means['cts']} and {means['reptile, 300 updates']}"
    yield f"without its shift: {means['no_shifting']}"
    for label, start, bold in (("random", "random", False), ("demo (CTS)", "demo", True)):
        average = sum(target["accuracy"] for target in demo[start].values()) / len(demo[start])
        cells = [*(cell(target, bold) for target in demo[start].values()), f"{'**' * bold}{average:.2f}{'**' * bold}"]
        yield f"| {label} | {' | '.join(cells)} |"
    yield f"{steps['cts']} steps per task for CTS, {steps['accurate']} exact, {steps['reptile']} Reptile"
    yield f"loss {optimizers['momentum']}; SGD {optimizers['SGD']}, Adam {optimizers['Adam']}"
    yield f"training loss {final_loss('cts')}, Reptile {final_loss('reptile')}"
    yield f"{contrast('reptile')} points"
    long, short = at_the_end("length")
    yield f"{long} of the exact one's length, {short} without"
    yield f"{step_ratio('resnet20/128/32', 'ddp')} for ResNet20 with batch 128"
    yield f"{step_ratio('resnet18/4/32', 'ddp')} for ResNet18 with batch 4"
    yield f"without communication: {step_ratio('resnet20/128/32', 'sgd')} for ResNet20 with batch 128"
    yield f"FFCV's loader: {loader_ratio()}"


def paper():
    (cts, reptile), steps, means, count, optimizers = synthetic()
    fig4, fig5, fig3 = (load(f"paper/{name}") for name in ("fig4", "fig5", "fig3"))
    yield f"CTS {steps['cts']}, Ours Accurate {steps['accurate']}, Reptile {steps['reptile']}"
    few, many = (sorted(fig5["fixed_points"][k]["loss_after_100_steps"]) for k in ("5", "100"))
    yield f"{len(few)} fixed points for k = 5, with losses {few[0]:.2f} and {few[-1]:.2f}"
    yield f"{len(many)} for k = 100, from {many[0]:.2f} to {many[-1]:.1f}"
    yield f"(−5, 5) CTS {cts[0]}, Reptile {reptile[0]}; from (15, 5) {cts[1]} and {reptile[1]}"
    yield (
        f"over {count} initializations: CTS {means['cts']}, without shift {means['no_shifting']}, exact shift "
        f"{means['accurate']}, Reptile {means['reptile, 300 updates']}"
    )
    grid, fixed = fig4["c"]["best_of_grid_after_k_steps"], fig4["c"]["best_fixed_point_of_reptile"]
    yield f"{grid['25']:.2f} for k = 25, {grid['50']:.2f} for k = 50, {grid['100']:.3f} for k = 100"
    first = [value for k, value in fixed.items() if int(k) <= 7]
    later = {f"{value:.2f}" for k, value in fixed.items() if int(k) >= 20}
    yield f"Reptile: {min(first):.2f} to {max(first):.2f} up to k = 7, but {' '.join(later)} from k = 20 on"
    yield f"mean loss {optimizers['momentum']}; plain SGD {optimizers['SGD']}, Adam {optimizers['Adam']}"
    for symbol, key in (("α", "alpha"), ("β", "beta"), ("k, random directions", "k")):
        slopes = [
            f"{line['slope']:.2f} ± {line['slope_ci95']:.2f}" for line in (fig3[key]["Softplus"], fig3[key]["ReLU"])
        ]
        yield rf"| {symbol} | \d | {slopes[0]} | {slopes[1]} |"
    one = fig3["k"]["Softplus, one direction"]
    yield rf"| k, one direction | \d | {one['slope']:.2f} ± {one['slope_ci95']:.2f} |"
    yield f"larger for ReLU ({fig3['factor_at_largest_k']['ReLU']:.0f} times at k = 32)"
    names = ("cts", "leap", "reptile", "no_shifting", "random_shifting")
    labels = tables.METHODS
    yield "training loss " + ", ".join(f"{labels[name]} {final_loss(name)}" for name in names)
    yield f"paired by seed, is {contrast('reptile')} points on two targets"
    yield f"No Shifting is {contrast('no_shifting')} points, minus Random Shifting {contrast('random_shifting')}"
    yield f"({unseen_classes('cts'):.1f} against {unseen_classes('single'):.1f} %)"

    length, error = at_the_end("length"), at_the_end("error")
    yield f"long ({length[0]} of the exact one at k = 1000, {length[1]} without it)"
    yield f"by about the distance travelled ({error[0]} and {error[1]})"


def figures():
    length, error, cosine = at_the_end("length"), at_the_end("error"), at_the_end("cosine")
    yield f"at k = 1000 nearly all of it for CTS ({error[0]}) and somewhat less without the shift ({error[1]})"
    yield f"{length[0]} of the exact length at k = 1000; without it or in a random direction, {length[1]}"
    yield f"cosine {cosine[0]} instead of {cosine[1]}"
    flat = load("paper/fig5")["judged_by_momentum_sgd_instead"]
    yield f"(mean loss {flat['mean_loss']:.3f})"
    yield f"all of {flat['starts_that_diverge_with_the_printed_template']} grid points diverge"


def reliability():
    soak = load("soak")
    typical = median(seconds for _, seconds in soak["hits"] if seconds)
    yield f"{soak['kills']} kills"
    yield f"median of {typical:.1f} s"
    yield f"{load('endurance')['steps']:,} steps"
    beside = load("endurance-beside")
    share = {key: ratio["median"] for key, ratio in beside["beside_fresh"].items()}
    yield f"{beside['steps']:,} steps old"
    yield f"{share['CPU time']:.2f} of the CPU time and {share['time']:.2f} of the time per step"


PAGES = {
    "README.md": readme,
    "docs/paper.md": paper,
    "docs/reliability.md": reliability,
    "benchmarks/paper/README.md": figures,
}


def prose(page):
    """A page's measured part in one line, without code and without the tables that test_tables.py compares."""
    text = tables.BLOCK.sub(" ", (ROOT / page).read_text())
    text = text[text.index(SECTIONS[page]) :] if page in SECTIONS else text
    text = re.sub(r"```.*?```|^    .*?$", " ", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


def found(claim, text):
    """The claim's place in the text; `\\d` stands for any digit."""
    return re.search(re.escape(claim).replace(r"\\d", r"\d"), text)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_the_files_say_and_no_other_number(page):
    text = prose(page)
    for claim in PAGES[page]():
        match = found(claim, text)
        assert match, f"{page} does not say {claim!r}: a result or the sentence has changed"
        text = text.replace(match[0], " ")
    left = re.findall(r"(?<![\w.,])\d+(?:[.,]\d+)+(?![\w])", text)
    assert set(left) <= set(SETTINGS[page].split()), f"{page}: no result has these numbers"


def test_the_page_of_omniglot_says_what_its_file_says():
    page = sorted(RESULTS.glob("*-omniglot.md"))[-1].read_text()
    for name, row in load("omniglot")["accuracy"].items():
        cells = [f"{row[shots]['mean']:.2f} ± {row[shots]['ci95']:.2f}" for shots in ("1-shot", "5-shot")]
        assert f"| {name} | {' | '.join(cells)} |" in page
