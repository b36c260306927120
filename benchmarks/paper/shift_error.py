"""What shifting does along an episode of K = 1000: theta_k against U_k(phi), replayed from the phi of that moment.

    python benchmarks/paper/shift_error.py data.root=data/long_horizon

Meta-trains as launch/train.py does. At some inner steps k, between inner step and meta-update, every task's episode is
replayed from the current phi with the same k batches. theta_k - U_k(phi) is the error of the method's trajectory (the
paper's Eq. 5, here for real meta-updates), and phi - U_k(phi) the meta-gradient that Ours Accurate would take. The
replays do not disturb the run. Every finished run is kept in shift_error.json, so the command resumes.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.figures import RESULTS, save
from benchmarks.paper.long_horizon_report import LOOKS
from benchmarks.paper.long_horizon_runs import differences
from dist_cts.algorithms import shifts
from dist_cts.algorithms.meta_gradients import reptile
from dist_cts.algorithms.table import make_algorithm
from dist_cts.config import load
from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import process_group, select_device
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.learner import TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.progress import Progress
from dist_cts.run.build import build_learners, initial_phi
from dist_cts.run.config import TrainConfig
from dist_cts.state import TrainState

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("cts", "no_shifting", "random_shifting")
KS = (10, 30, 100, 300, 1000)
DATA_ORDER = "data_order"  # the yardstick, beside the methods
UNSEEN = 10  # batches behind the current one, on which theta_k and U_k(phi) are compared
Record = dict[str, dict[int, list[float]]]  # by quantity and k, a value per task or one for all tasks


@dataclass
class Probe:
    """The Reptile difference as the meta-gradient of a run, measuring at the steps `ks` of episode `episode`."""

    learners: list[TaskLearner]
    progress: Progress
    episode: int
    ks: Sequence[int]
    record: Record = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, learner: TaskLearner, phi: Tensor) -> Tensor:
        if self.progress.episode == self.episode and self.progress.inner_step in self.ks:
            self.measure(learner, phi)
        return reptile(learner, phi)

    def measure(self, learner: TaskLearner, phi: Tensor) -> None:
        step, theta = self.progress.step, learner.theta.clone()
        state = {name: value.clone() for name, value in learner.state_dict().items()}
        self.add("loss", unseen_loss(learner, step))
        shifts.replay_from(learner, phi, self.progress)
        exact = learner.theta.clone()
        self.add("exact_loss", unseen_loss(learner, step))
        learner.load_state_dict(state)
        learner.batches.seek(step)
        self.add("error", (theta - exact).norm().item())
        self.add("distance", (theta - phi).norm().item())
        self.add("exact_distance", (exact - phi).norm().item())
        for name, vector in (("taken", phi - theta), ("accurate", phi - exact)):
            self.sums[name] = vector if learner is self.learners[0] else self.sums[name] + vector
        if learner is self.learners[-1]:
            self.add("cosine", torch.cosine_similarity(self.sums["taken"], self.sums["accurate"], dim=0).item())
            self.add("length_ratio", (self.sums["taken"].norm() / self.sums["accurate"].norm()).item())

    def add(self, quantity: str, value: float) -> None:
        self.record.setdefault(quantity, {}).setdefault(self.progress.inner_step, []).append(value)


def unseen_loss(learner: TaskLearner, step: int) -> float:
    """Mean training loss of theta on the batches behind `step`."""
    learner.batches.seek(step)
    with learner.running_statistics_kept():
        losses = [learner.compute_loss(learner.batches.next())[0].item() for _ in range(UNSEEN)]
    return sum(losses) / len(losses)


def run(config: TrainConfig, ks: Sequence[int]) -> tuple[Record, Tensor]:
    """Meta-trains in this process; what was measured at the steps `ks` of the last episode, and phi [N] at the end."""
    device = select_device(config.device)
    with process_group(device, config.timeout_seconds):
        placement = place(len(config.tasks), 1, 0)
        learners = build_learners(config, placement, device)
        layout, progress = learners[0].flat.body_layout, Progress(config.inner_steps)
        state = TrainState(initial_phi(config, learners[0].flat, device)[0], layout, learners, progress)
        probe = Probe(learners, progress, config.episodes, ks)
        algorithm = replace(
            make_algorithm(
                config.algorithm,
                config.method,
                inner_steps=config.inner_steps,
                meta_lr=config.meta_lr,
                seed=config.seed,
            ),
            begin=shifts.begin_exact,
            meta_gradient=probe,
        )
        reducer = MetaReducer(state.phi, learners, placement)
        M, K = config.episodes, config.inner_steps
        meta_train(state, algorithm, reducer, beta=config.meta_lr, M=M, K=K, outer=config.outer)
        return probe.record, state.phi


def data_order(config: TrainConfig, ks: Sequence[int]) -> Record:
    """The yardstick: the distance of two first episodes without meta-updates that differ in their batches alone."""
    device = select_device(config.device)
    with process_group(device, config.timeout_seconds):
        learners = build_learners(config, place(len(config.tasks), 1, 0), device)
        phi = initial_phi(config, learners[0].flat, device)[0]
        record: Record = {"error": {k: [] for k in ks}, "distance": {k: [] for k in ks}}
        for learner in learners:
            paths = []
            for first in (0, ks[-1]):
                learner.restart(phi)
                path, done = [], 0
                for k in ks:
                    learner.replay(first + done, k - done)
                    path.append(learner.theta.clone())
                    done = k
                paths.append(path)
            for k, one, other in zip(ks, *paths, strict=True):
                record["error"][k].append((one - other).norm().item())
                record["distance"][k].append((one - phi).norm().item())
        return record


# ---------------------------------------------------------------- the figure


def over_tasks(record: Record, quantity: str) -> np.ndarray:
    """Mean over the tasks, for each k."""
    return np.array([np.mean(values) for values in record[quantity].values()])


def ratio(record: Record, above: str, below: str) -> np.ndarray:
    """Mean over the tasks of the ratio of two quantities, for each k."""
    return np.array([np.mean(np.divide(record[above][k], record[below][k])) for k in record[above]])


QUANTITIES: dict[str, tuple[str, Callable[[Record], np.ndarray]]] = {  # as drawn: label, and value [ks] of a run
    "error": (
        r"$\|\theta_k - U_k(\phi)\|\ /\ \|U_k(\phi) - \phi\|$",
        lambda record: ratio(record, "error", "exact_distance"),
    ),
    "cosine": (r"cosine of $\Delta_k$ and accurate $\Delta_k$", lambda record: over_tasks(record, "cosine")),
    "length": (r"$\|\Delta_k\|$ / $\|$accurate $\Delta_k\|$", lambda record: over_tasks(record, "length_ratio")),
    "distance": (r"$\|\theta_k - \phi\|$", lambda record: over_tasks(record, "distance")),
    "loss": (
        r"loss on unseen batches, $\theta_k$ minus $U_k(\phi)$",
        lambda record: over_tasks(record, "loss") - over_tasks(record, "exact_loss"),
    ),
}


def run_name(method: str, beta: float, episode: int, seed: int) -> str:
    return f"{method}-beta{beta:g}-episode{episode}-seed{seed}"


def values(runs: dict[str, Record], method: str, beta: float, episode: int, quantity: str) -> np.ndarray:
    """One of QUANTITIES in the runs of a method, [seeds, ks]."""
    name = run_name(method, beta, episode, 0).rpartition("-seed")[0]
    return np.array([QUANTITIES[quantity][1](record) for record in seeds_of(runs, name)])


def seeds_of(runs: dict[str, Record], name: str) -> list[Record]:
    """The runs called `name` without their -seedS."""
    return [record for key, record in runs.items() if key.rpartition("-seed")[0] == name]


def draw(runs: dict[str, Record], beta: float, out: Path, facts: dict) -> None:
    """A row per episode, a column per quantity: mean and range over the seeds."""
    episodes = [episode for other, episode in measured(runs) if other == beta] or [1]
    fig, panels = plt.subplots(
        len(episodes), len(QUANTITIES), figsize=(15, 2.8 * len(episodes)), squeeze=False, layout="constrained"
    )
    for axes, episode in zip(panels, episodes, strict=True):
        for ax, (quantity, (label, _)) in zip(axes, QUANTITIES.items(), strict=True):
            ax.set(xscale="log", xlabel="$k$", ylabel=label)
            for method in METHODS:
                rows = values(runs, method, beta, episode, quantity)
                if len(rows):
                    name, colour = LOOKS[method]
                    ax.plot(KS, rows.mean(0), "o-", ms=4, color=colour, label=name)
                    ax.fill_between(KS, rows.min(0), rows.max(0), color=colour, alpha=0.2, lw=0)
        if orders := [ratio(record, "error", "distance") for record in seeds_of(runs, DATA_ORDER)]:
            axes[0].plot(KS, np.mean(orders, 0), ":", color="#777777", label="other batches")
        axes[0].set(ylim=(0, None), title=f"episode {episode}")
        axes[0].legend()
        axes[1].set_ylim(top=1.02)
        for column, exact in ((2, 1), (4, 0)):
            axes[column].axhline(exact, color="#999999", lw=0.8)
    save(fig, out, "shift_error", facts | {"ks": KS, "runs": runs})


def measured(runs: dict[str, Record]) -> list[tuple[float, int]]:
    """Every beta and episode of which there is a run."""
    found = {re.fullmatch(r"\w+-beta(.+)-episode(\d+)-seed\d+", name) for name in runs}
    return sorted({(float(match[1]), int(match[2])) for match in found if match})


def read(path: Path, settings: dict | None = None) -> dict[str, Record]:
    """The runs in the file, by name; empty without a file.

    Raises:
        SystemExit: they were made with settings other than `settings`.
    """
    stored = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    if settings and (different := differences(stored["settings"], settings)):
        raise SystemExit(f"{path}: made with other settings ({different}); move it away, or use --out")
    return {
        name: {quantity: {int(k): values for k, values in row.items()} for quantity, row in record.items()}
        for name, record in stored["runs"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "long_horizon.yaml")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, DATA_ORDER], default=[*METHODS, DATA_ORDER])
    parser.add_argument("--beta", type=float, default=0.01, help="of every method (default: the paper's for K = 1000)")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1], help="measured episodes, one run for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of shift_error.json and .png")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for meta-training")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    settings = {"config": args.config.name, "overrides": [o for o in args.overrides if not o.startswith("data.root=")]}
    path = args.out / "shift_error.json"
    runs = read(path, settings)
    for seed, episode, method in itertools.product(args.seeds, args.episodes, args.methods):
        name = f"{DATA_ORDER}-seed{seed}" if method == DATA_ORDER else run_name(method, args.beta, episode, seed)
        if name in runs:
            continue
        values = [f"meta_lr={args.beta}", f"seed={seed}", f"inner_steps={KS[-1]}", f"episodes={episode}"]
        values += [f"algorithm={'no_shifting' if method == DATA_ORDER else method}", *args.overrides]
        config = load(TrainConfig, args.config, values)
        runs[name] = data_order(config, KS) if method == DATA_ORDER else run(config, KS)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "runs": runs}) + "\n")
    draw(runs, args.beta, args.out, {"settings": settings})


if __name__ == "__main__":
    main()
