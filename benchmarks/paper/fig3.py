"""Figure 3 of the paper: the error of continual trajectory shifting against alpha, beta and k (supplement C.4).

    python benchmarks/paper/fig3.py [--data BETON_DIR/NAME] [--batch-size B] [--draws N] [--float64] [--out DIR]

The error is U_k(phi + delta_1 + ... + delta_(k-1)) - U_1(... U_1(U_1(phi) + delta_1) ... + delta_(k-1)), with the
same batches in both, for ResNet20 with ReLU and with Softplus. The meta-updates are random and of norm beta.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from torch import Tensor, fx, nn

from benchmarks.paper.figures import BLUE, GREEN, ORANGE, PURPLE, RED, RESULTS, save
from dist_cts import models
from dist_cts.data.batches import DataConfig, TaskBatches, open_task
from dist_cts.data.prepare import catalog
from dist_cts.data.prepare.task import Options, prepare
from dist_cts.errors import RunError
from dist_cts.flat import FlatParams
from dist_cts.run.exit_codes import DONE, finish
from dist_cts.seeds import hashed_seed

Gradient = Callable[[Tensor, int], Tensor]  # of theta [N] and the step 0, 1, ...: grad L_step(theta) [N]

ALPHA, BETA, K = 0.01, 0.1, 10  # fixed values while another one varies
ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1)
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)
KS = (2, 4, 8, 16, 32)
MOMENTUM, DECAY = 0.9, 0.01


# ---------------------------------------------------------------- the error


def trajectory(
    gradient: Gradient,
    theta: Tensor,
    steps: int,
    alpha: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    deltas: Tensor | None = None,
) -> Iterator[Tensor]:
    """theta [N] after each of `steps` steps of SGD; `deltas` [steps - 1, N] shift it between them."""
    velocity = torch.zeros_like(theta)
    for step in range(steps):
        velocity = momentum * velocity + gradient(theta, step) + weight_decay * theta
        theta = theta - alpha * velocity
        yield theta
        if deltas is not None and step < steps - 1:
            theta = theta + deltas[step]


def shift_errors(
    gradient: Gradient, phi: Tensor, deltas: Tensor, ks: Sequence[int], alpha: float, **inner: float
) -> dict[int, Tensor]:
    """The error [N] (supplement C.4, Eq. 2) for each k of `ks`; `deltas` is [max(ks) - 1, N].

    One shifted trajectory serves all k; each k needs an exact one, from phi + delta_1 + ... + delta_(k-1).
    """
    shifted = dict(enumerate(trajectory(gradient, phi, max(ks), alpha, deltas=deltas, **inner), 1))
    errors = {}
    for k in ks:
        *_, exact = trajectory(gradient, phi + deltas[: k - 1].sum(0), k, alpha, **inner)
        errors[k] = exact - shifted[k]
    return errors


# ---------------------------------------------------------------- ResNet20 as a function of one vector


def with_softplus(model: nn.Module) -> nn.Module:
    """The same model, weights shared, with Softplus in place of every ReLU."""
    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        if node.target is torch.relu:
            node.target = nn.functional.softplus
    traced.recompile()
    return traced


class Task:
    """A draw: weights, batches and directions that follow from its number; theta [N] are body and head together."""

    def __init__(self, batches: TaskBatches, classes: int, draw: int, activation: str, dtype: torch.dtype) -> None:
        self.batches, self.dtype = batches, dtype
        self.cache: list[tuple[Tensor, Tensor]] = []
        model, head = models.build(models.ModelConfig(), classes, "fig3", draw)
        self.model = (with_softplus(model) if activation == "Softplus" else model).to(dtype)
        self.flat = FlatParams(self.model, head)
        self.start = self.flat.vector.clone()
        self.body = self.flat.body.numel()
        generator = torch.Generator().manual_seed(hashed_seed("fig3", "directions", draw))
        self.directions = torch.zeros(max(*KS, K) - 1, len(self.start), dtype=dtype)
        for row in self.directions:  # phi is the body: the head is not shifted, nor are the gaps between tensors
            for view in self.flat.body_layout.views(row).values():
                view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))  # independent of dtype
            row /= row.norm()

    def gradient(self, theta: Tensor, step: int) -> Tensor:
        while len(self.cache) <= step:
            images, labels = self.batches.next()
            self.cache.append((images.to(self.dtype), labels))
        images, labels = self.cache[step]
        self.flat.vector.copy_(theta)
        self.flat.differentiate(nn.functional.cross_entropy(self.model(images), labels))
        return self.flat.grad.clone()

    def log_errors(self, beta: float, ks: Sequence[int], alpha: float, aligned: bool = False, **inner: float) -> list:
        """log10 of the norm of the body's error, for each k; `aligned`: all meta-updates are the first one."""
        directions = self.directions[:1].expand_as(self.directions) if aligned else self.directions
        errors = shift_errors(self.gradient, self.start, beta * directions, ks, alpha, **inner)
        return [errors[k][: self.body].norm().log10().item() for k in ks]


SERIES = {
    # name: the settings of `log_errors` and the activation
    "ReLU": ({}, "ReLU"),
    "Softplus": ({}, "Softplus"),
    f"Softplus, momentum {MOMENTUM}": ({"momentum": MOMENTUM}, "Softplus"),
    f"Softplus, weight decay {DECAY}": ({"weight_decay": DECAY}, "Softplus"),
    "Softplus, one direction": ({"aligned": True}, "Softplus"),
}


def measure(batches: Callable[[int], TaskBatches], classes: int, draws: int, dtype: torch.dtype) -> dict:
    """log10 errors [draws][values] by panel (alpha, beta, k) and series; alpha and beta for the first two series."""
    result: dict = {panel: {} for panel in ("alpha", "beta", "k")}
    for draw in range(draws):
        started = time.process_time()
        for activation in ("ReLU", "Softplus"):
            task = Task(batches(draw), classes, draw, activation, dtype)
            alpha = [task.log_errors(BETA, [K], value)[0] for value in ALPHAS]
            beta = [task.log_errors(value, [K], ALPHA)[0] for value in BETAS]
            result["alpha"].setdefault(activation, []).append(alpha)
            result["beta"].setdefault(activation, []).append(beta)
            for name, (settings, of) in SERIES.items():
                if of == activation:
                    result["k"].setdefault(name, []).append(task.log_errors(BETA, KS, ALPHA, **settings))
        print(f"draw {draw + 1} of {draws}: {time.process_time() - started:.0f} s of CPU time", flush=True)
    return result


# ---------------------------------------------------------------- the figure


def summary(values: Sequence[float], errors: list) -> dict:
    """Mean and 95 % confidence interval of log10 errors [draws][values], and the log-log slope with its interval."""
    y = np.array(errors)
    if not np.isfinite(y).all():
        raise RunError(f"a trajectory of alpha, beta or k = {list(values)} is not finite, log10 errors {errors}")
    half = stats.t.ppf(0.975, max(1, len(y) - 1)) / np.sqrt(len(y))
    slopes = np.polyfit(np.log10(values), y.T, 1)[0]
    spread = {"std": y.std(0, ddof=1), "slope": slopes.std(ddof=1)} if len(y) > 1 else {"std": 0 * y[0], "slope": 0.0}
    return {
        "values": list(values),
        "log10_error_mean": y.mean(0).tolist(),
        "log10_error_ci95": (half * spread["std"]).tolist(),
        "slope": slopes.mean().item(),
        "slope_ci95": float(half * spread["slope"]),
        "log10_errors": [[round(value, 4) for value in row] for row in y.tolist()],
    }


LOOKS = dict(zip(SERIES, [(BLUE, "o-"), (ORANGE, "s-"), (RED, "^--"), (GREEN, "v:"), (PURPLE, "D-.")], strict=True))
PANELS = {  # symbol, values, and what varies with it in section 3.3's O(beta alpha h k^2 + beta^2 k)
    "alpha": (r"$\alpha$", ALPHAS, "1, then 0"),
    "beta": (r"$\beta$", BETAS, "1, then 2"),
    "k": ("$k$", KS, "2, and 1.5 where directions are random"),
}


def draw_figure(errors: dict, out: Path, facts: dict) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    numbers: dict = facts | {"base": {"alpha": ALPHA, "beta": BETA, "k": K}}
    for ax, letter, (panel, (symbol, values, bound)) in zip(axes, "abc", PANELS.items(), strict=True):
        numbers[panel] = {"slope_expected": bound}
        for name, measured in errors[panel].items():
            line = numbers[panel][name] = summary(values, measured)
            color, style = LOOKS[name]
            mean, half = np.array(line["log10_error_mean"]), np.array(line["log10_error_ci95"])
            ax.plot(values, mean, style, color=color, ms=5, label=f"{name}: slope {line['slope']:.2f}")
            ax.fill_between(values, mean - half, mean + half, color=color, alpha=0.25, lw=0)
        others = [f"{s} = {v:g}" for s, v in ((r"\alpha", ALPHA), (r"\beta", BETA), ("k", K)) if s not in symbol]
        ax.set(xscale="log", xlabel=symbol, title=f"({letter}) ${', '.join(others)}$")
        ax.legend(loc="upper left")
        low, high = ax.get_ylim()
        ax.set_ylim(top=high + (0.5 if panel == "k" else 0.2) * (high - low))  # room for the legend
    axes[2].set_xticks(KS, [str(k) for k in KS])
    axes[2].minorticks_off()
    axes[0].set_ylabel(r"$\log_{10}\ \|\varepsilon\|_2$")
    at = KS.index(max(KS))
    base = np.array(errors["k"]["Softplus"])[:, at]
    numbers["factor_at_largest_k"] = {
        name: float(10 ** (np.array(series)[:, at] - base).mean())
        for name, series in errors["k"].items()
        if name != "Softplus"
    }
    save(fig, out, "fig3", numbers)


def run(args: argparse.Namespace) -> int:
    dtype = torch.float64 if args.float64 else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.data)
        if args.data.startswith(catalog.EMBEDDED):
            folder = Path(scratch, "task")
            prepare(catalog.entry(args.data), None, folder, Options())
        config = DataConfig()
        source = open_task(folder, "train", config, torch.device("cpu"))
    manifest = source.manifest
    errors = measure(
        lambda draw: TaskBatches(source, draw, args.batch_size, config), manifest.classes, args.draws, dtype
    )
    draw_figure(
        errors,
        args.out,
        {
            "data": f"{manifest.name}, {manifest.classes} classes, {manifest.pixels} x {manifest.pixels}",
            "batch_size": args.batch_size,
            "draws": args.draws,
            "dtype": str(dtype),
        },
    )
    return DONE


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="embedded:colours", help="a prepared task's folder, or embedded:TASK (default %(default)s)")
    add("--batch-size", type=int, default=16, help="default %(default)s; the paper has 128")
    add("--draws", type=int, default=10, help="default %(default)s")
    add("--float64", action="store_true", help="takes three times as long; float32 hides errors below about 1e-5")
    add("--out", type=Path, default=RESULTS, help="folder for fig3.png and fig3.json (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(finish(lambda: run(parser().parse_args())))
