"""`dist-cts synthetic`: meta-trains one initialization on the paper's synthetic tasks and writes its trajectory.

    dist-cts synthetic --algorithm cts --start -5 5 --out runs/synthetic

OUT/trajectory.json holds, in float64:
    phi                   [1 + updates][2]: the start, then phi after every meta-update
    theta                 [T][M K][2]: every task's theta after every inner step, its shift included
    loss_after_100_steps  mean over the tasks, from the last phi, by the test optimizer
    inner_gradient_steps  [1 + updates]: gradient steps that a task has spent when phi gets there, replays included
and the settings. Exit codes: 0 done, 1 error (a trajectory diverges), 2 bad usage.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from dist_cts.commands.parser import Parser
from dist_cts.errors import RunError
from dist_cts.learner import InnerConfig
from dist_cts.run.exit_codes import DONE, finish
from dist_cts.synthetic import METHODS, TEST_STEPS, load_environment, meta_train_point, quality

OPTIMIZERS = ("sgd", "momentum", "adam")


def number(low: float, high: float = math.inf):
    def parse(text: str) -> float:
        if not low < float(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return float(text)

    parse.__name__ = "number"  # argparse shows it
    return parse


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def inner_config(optimizer: str, lr: float, momentum: float) -> InnerConfig:
    """`sgd` is SGD without momentum; `momentum` is also Adam's beta_1."""
    name = "adam" if optimizer == "adam" else "sgd"
    return InnerConfig(optimizer=name, lr=lr, momentum=0 if optimizer == "sgd" else momentum, weight_decay=0)


def parser() -> Parser:
    parser = Parser(
        prog="dist-cts synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, positive, finite = parser.add_argument, number(0), number(-math.inf)
    add("--algorithm", choices=METHODS, default="cts", help="default cts")
    add("--env", default="released", help="released (default), paper, or a JSON file: centers, angles, coeff, scale")
    add("--start", type=finite, nargs=2, metavar=("X", "Y"), default=(-5.0, 5.0), help="phi_0 (default -5 5)")
    add("--inner-steps", type=count, default=100, metavar="K", help="inner steps an episode (default 100)")
    add("--episodes", type=count, default=3, metavar="M", help="default 3")
    add("--inner-lr", type=positive, default=0.05, metavar="ALPHA", help="default 0.05")
    add("--meta-lr", type=positive, default=0.1, metavar="BETA", help="default 0.1")
    add("--inner-optimizer", choices=OPTIMIZERS, default="momentum", help="default momentum")
    add(
        "--momentum", type=number(-1e-9, 1), default=0.9, metavar="MU", help="of momentum; beta_1 of adam (default 0.9)"
    )
    add("--reset-optimizer", action="store_true", help="clear the optimizer's state at every episode's start")
    add("--test-optimizer", choices=OPTIMIZERS, default="adam", help="what judges the last phi (default adam)")
    add("--test-lr", type=positive, default=0.1, metavar="ALPHA", help="its learning rate (default 0.1)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for trajectory.json")
    return parser


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # vectors of two numbers
    env = load_environment(args.env)
    trajectory = meta_train_point(
        env,
        tuple(args.start),
        args.algorithm,
        inner_config(args.inner_optimizer, args.inner_lr, args.momentum),
        beta=args.meta_lr,
        M=args.episodes,
        K=args.inner_steps,
        reset_optimizer=args.reset_optimizer,
    )
    first, last = quality(env, trajectory.phi[[0, -1]], inner_config(args.test_optimizer, args.test_lr, 0.9)).tolist()
    if not math.isfinite(last):
        raise RunError(f"{args.test_optimizer} diverges from the last phi: take a --test-lr below {args.test_lr}")
    settings = {key: str(value) if key == "out" else value for key, value in vars(args).items()}
    result = {
        "settings": settings,
        "environment": env.model_dump(),
        "phi": trajectory.phi.tolist(),
        "theta": trajectory.theta.tolist(),
        f"loss_after_{TEST_STEPS}_steps": last,
        "inner_gradient_steps": trajectory.inner_gradient_steps,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "trajectory.json").write_text(json.dumps(result, allow_nan=False))
    x, y = trajectory.phi[-1].tolist()
    print(
        f"{args.out / 'trajectory.json'}: phi ({x:.4f}, {y:.4f}) after {len(trajectory.phi) - 1} meta-updates and "
        f"{trajectory.inner_gradient_steps[-1]} inner-gradient steps per task; mean loss after {TEST_STEPS} steps "
        f"{last:.4f}, from the start {first:.4f}"
    )
    return DONE


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return finish(lambda: run(args))
