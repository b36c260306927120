"""What each augmentation adds to an inner step, on the demo's network and batch; see --help."""

import time
from functools import partial

import torch

from benchmarks.learners import INNER, Noise, synchronise
from benchmarks.report import alternate, parser, publish, ratio, shown, spread
from dist_cts import config, models
from dist_cts.data.batches import DataConfig, TaskBatches
from dist_cts.learner import TaskLearner
from dist_cts.run.config import TrainConfig

EPILOG = """\
Inner steps of one task of random images with the network and the batch size of configs/demo.yaml, each augmentation of
configs/augmented.yaml alone and all together, in alternation. `none` has the paper's padded crop and flip. CPU time is
that of the process, all its threads: it is less sensitive to other programs.

  python benchmarks/augmentation.py
"""
PIXELS, ROUNDS, STEPS = 24, 25, 4


def settings() -> dict[str, dict]:
    """`data.augment` by name: what configs/augmented.yaml sets, each alone and all together."""
    given = config.load(TrainConfig, config.find("augmented")).data.augment.model_dump(exclude_defaults=True)
    jitter = {key: given[key] for key in ("brightness", "contrast", "saturation", "hue") if key in given}
    alone = {key.replace("_", " "): {key: value} for key, value in given.items() if key not in jitter}
    return {"none": {}, **alone, "color jitter": jitter, "all": given}


def take(learner: TaskLearner, steps: int, cpu: list[float]) -> None:
    """Inner steps, until the device has finished them; appends the CPU seconds per step."""
    started = time.process_time()
    for _ in range(steps):
        learner.inner_step()
    synchronise(learner.theta.device)
    cpu.append((time.process_time() - started) / steps)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, EPILOG)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = options.parse_args(arguments)
    device, rounds, steps = torch.device(args.device), 1 if args.quick else ROUNDS, 1 if args.quick else STEPS
    demo = config.load(TrainConfig, config.find("demo"))
    noise, competitors, cpu = Noise(device, pixels=PIXELS), {}, {}
    for name, augment in settings().items():
        batches = TaskBatches(noise, 0, demo.batch_size, DataConfig(augment=augment))
        model, parts = models.build(demo.model, noise.manifest.classes, 0, name)
        learner = TaskLearner(name, model.to(device), parts, batches, INNER)
        competitors[name] = partial(take, learner, steps, cpu.setdefault(name, []))
    seconds = alternate(competitors, rounds)
    cpu = {name: values[-rounds:] for name, values in cpu.items()}
    per_step = {name: [value / steps for value in values] for name, values in seconds.items()}
    rows = [
        {
            "augmentation": name,
            "ms per step": shown(spread([1e3 * value for value in values])),
            "CPU ms": shown(spread([1e3 * value for value in cpu[name]])),
            "to none": shown(ratio(values, per_step["none"])),
            "to none, CPU": shown(ratio(cpu[name], cpu["none"])),
        }
        for name, values in per_step.items()
    ]
    shape = {"model": demo.model.model_dump(), "batch_size": demo.batch_size, "pixels": PIXELS}
    times = {"seconds_per_step": per_step, "cpu_seconds_per_step": cpu}
    publish("augmentation", shape | {"settings": settings()} | times, rows, args, device)


if __name__ == "__main__":
    main()
