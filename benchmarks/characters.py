"""A character language model, meta-learned over eight corpora and adapted to held-out ones, by CTS and Reptile.

Every installation has the corpora (dist_cts/examples/corpora.py); their content depends on the package versions.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import parser, publish
from dist_cts import MetaTestConfig, TrainConfig, config, meta_test, train
from dist_cts.examples import characters, corpora
from dist_cts.run.report import interval, start_colours

EPILOG = """\
Beta of a method is the best of BETAS by the loss on two validation corpora after adaptation, meta-training seed 0; the
figures are of other meta-training seeds and other corpora. bpc: bits per character on the test text, mean over seeds
and corpora, with a 95 % interval over the meta-training seeds (random initialization: over its own seeds).

  python benchmarks/characters.py
"""
BETAS = {"cts": (1.0, 0.1, 0.01), "reptile": (1.0, 0.1, 0.01)}
VALIDATION = ("tables", "drawings")
TARGETS = ("cython", "cmake", "json", "web")
SEEDS = (1, 2, 3)
QUICK = ["episodes=2", "inner_steps=3", "batch_size=2", "model.width=0.25"]


def meta_train(folder: Path, method: str, beta: float, seed: int, *overrides: str) -> str:
    """Meta-trains by configs/characters.yaml; returns the path of phi."""
    run_dir = folder / f"{method}-{beta:g}-{seed}"
    chosen = [f"algorithm={method}", f"meta_lr={beta}", f"seed={seed}", f"run_dir={run_dir}", "device=cpu"]
    assert train(config.load(TrainConfig, config.find("characters"), [*chosen, *overrides])) == 0
    return str(run_dir / "phi.safetensors")


def adapt(folder: Path, phis: Mapping[str, str], targets: tuple[str, ...], *overrides: str) -> list[dict[str, Any]]:
    """Meta-tests by configs/characters_meta_test.yaml: one result per initialization, target and seed."""
    chosen = [f"targets=[{', '.join(targets)}]", f"out={folder}", "device=cpu"]
    assert meta_test(config.load(MetaTestConfig, config.find("characters_meta_test"), [*chosen, *overrides]), phis) == 0
    return json.loads((folder / "meta_test.json").read_text())["results"]


def bpc(results: list[dict[str, Any]], start: str, target: str | None = None, seed: int | None = None) -> list[float]:
    """Mean bits per character at each evaluation, over the results of one initialization."""
    curves = [
        [point["loss"] / math.log(2) for point in result["curve"]]
        for result in results
        if result["start"] == start and target in (None, result["target"]) and seed in (None, result["seed"])
    ]
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def summarize(results: list[dict[str, Any]], method: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """bpc after the last step per target and in the mean, and the mean curve over the steps."""
    runs = [(method, seed) for seed in range(len(seeds))] if method == "random" else [
        (f"{method}-{seed}", None) for seed in seeds
    ]  # fmt: skip
    targets = list(dict.fromkeys(result["target"] for result in results))
    columns: dict[str, Any] = {"mean": None, **{target: target for target in targets}}
    last = {name: [bpc(results, start, target, seed)[-1] for start, seed in runs] for name, target in columns.items()}
    curves = [bpc(results, start, None, seed) for start, seed in runs]
    return {
        "bpc": {name: dict(zip(("mean", "ci95"), interval(values), strict=True)) for name, values in last.items()},
        "curve": [sum(values) / len(values) for values in zip(*curves, strict=True)],
        "per_seed": last["mean"],
    }


def draw(path: Path, steps: list[int], summary: Mapping[str, Any]) -> None:
    """The mean bpc of each initialization along adaptation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 3.2), layout="constrained")
    colours = start_colours(summary)
    for start, row in summary.items():
        axes.plot(steps, row["curve"], marker="o", color=colours[start], label=start)
    axes.set_xlabel("steps on the new corpus")
    axes.set_ylabel("bits per character, test text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, EPILOG)
    options.add_argument("--figure", type=Path, help="PNG of bpc along adaptation")
    options.add_argument("--work", type=Path, help="folder of the runs, from which an interrupted benchmark resumes")
    args = options.parse_args(arguments)
    quick = QUICK if args.quick else []
    fewer = [*QUICK[2:], "steps=2", "eval_points=1"] if args.quick else ["eval_points=5"]
    seeds, targets = (SEEDS[:2], TARGETS[-1:]) if args.quick else (SEEDS, TARGETS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        scan = {
            f"{method}-{beta:g}": meta_train(folder, method, beta, 0, *quick)
            for method, betas in BETAS.items()
            for beta in (betas[:1] if args.quick else betas)
        }
        validated = adapt(folder / "scan", scan, VALIDATION, "random=false", "seeds=1", *fewer)
        losses = {start: bpc(validated, start)[-1] for start in scan}
        chosen = {
            method: min(betas, key=lambda beta: losses.get(f"{method}-{beta:g}", math.inf))
            for method, betas in BETAS.items()
        }
        phis = {
            f"{method}-{seed}": meta_train(folder, method, beta, seed, *quick)
            for method, beta in chosen.items()
            for seed in seeds
        }
        results = [
            *adapt(folder / "random", {}, targets, f"seeds={len(seeds)}", *fewer),
            *adapt(folder / "test", phis, targets, "random=false", "seeds=1", *fewer),
        ]
    steps = [point["step"] for point in results[0]["curve"]]
    summary = {start: summarize(results, start, seeds) for start in ("random", *BETAS)}
    if args.figure:
        draw(args.figure, steps, summary)
    rows = [
        {"start": start, **{name: cell["mean"] for name, cell in row["bpc"].items()}} for start, row in summary.items()
    ]
    document = {
        "scan_bpc": losses,
        "betas": chosen,
        "steps": steps,
        "summary": summary,
        "corpora": {name: corpora.DATASETS[name]("train").fingerprint for name in corpora.CORPORA},
        "parameters": sum(p.numel() for p in characters.CharacterModel(len(corpora.CHARACTERS), 0.5).parameters()),
    }
    publish("characters", document, rows, args)


if __name__ == "__main__":
    main()
