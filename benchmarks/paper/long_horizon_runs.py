"""One run of the long-horizon study: its configurations, its computation and its record, a JSON file."""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_cts.config import load
from dist_cts.errors import RunError
from dist_cts.run.config import TrainConfig
from dist_cts.run.exit_codes import STOPPED
from dist_cts.run.meta_test import MetaTestConfig, meta_test
from dist_cts.run.train import train

ROOT = Path(__file__).resolve().parents[2]


def argument_parser(description: str | None, work: Path, results: Path, *, steps: int) -> argparse.ArgumentParser:
    """The options of every command that queues such runs; the arguments are the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "long_horizon.yaml")
    parser.add_argument("--meta-test", type=Path, default=ROOT / "configs" / "long_horizon_meta_test.yaml")
    parser.add_argument("--work", type=Path, default=work, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=results, help="folder of the finished runs' JSON files")
    parser.add_argument("--workers", type=int, default=2, help="concurrent runs, one process and thread each")
    parser.add_argument("--steps", type=int, default=steps, help="inner steps per task of a run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every setting")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for meta-training and meta-test")
    return parser


@dataclass(frozen=True)
class Run:
    """One meta-training with its meta-test."""

    method: str
    K: int
    beta: float
    seed: int
    kind: str = "main"  # main: meta-test on the targets; tune: on the validation tasks; pilot: none
    snapshots: bool = False  # also meta-test phi at 1/6, 1/3 and 2/3 of the steps: Figure 7
    options: tuple[str, ...] = ()  # further overrides of the meta-training, such as method.imaml.lam=2

    @property
    def name(self) -> str:
        options = "".join(f"-{shown(option)}" for option in self.options)
        return f"{self.kind}-{self.method}-K{self.K}-beta{self.beta:g}{options}-seed{self.seed}"


def shown(option: str) -> str:
    """An override without its sections: lam=0.2 for method.imaml.lam=0.2."""
    key, _, value = option.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


@dataclass(frozen=True)
class Study:
    """Settings shared by all runs."""

    config: Path
    meta_test_config: Path
    validation: tuple[str, ...]
    work: Path
    results: Path
    steps: int  # inner steps per task of a main run
    tune_steps: int  # inner steps per task of a tuning run
    horizons: tuple[int, ...]  # the values of K, the main one first
    overrides: tuple[str, ...] = ()  # for meta-training and meta-test
    fine_lr: float = 0.0  # learning rate of the meta-test; 0: not chosen yet

    def training(self, run: Run) -> TrainConfig:
        """The resolved configuration of a run's meta-training."""
        tasks = load(TrainConfig, self.config).task_names
        steps = {"main": self.steps, "tune": self.tune_steps, "pilot": run.K}[run.kind]
        algorithm, _, source = run.method.partition("-")
        if source and algorithm == "single":  # one source for as many steps as all tasks together
            algorithm, steps, tasks = "mtl", steps * len(tasks), [source]
        else:
            algorithm = run.method
        values = [f"algorithm={algorithm}", f"inner_steps={run.K}", f"episodes={steps // run.K}"]
        values += [f"meta_lr={run.beta}", f"seed={run.seed}", f"tasks={json.dumps(tasks)}", "log_every=100"]
        values += [f"run_dir={self.work / run.name}", f"snapshot_every={steps // 6 if run.snapshots else 0}"]
        return load(TrainConfig, self.config, [*values, "checkpoint.every_steps=1000", *run.options, *self.overrides])

    def testing(self, run: Run | None, **changes: Any) -> MetaTestConfig:
        """The resolved configuration of a run's meta-test; None: that of random initialization."""
        values = [f"inner.lr={self.fine_lr}"] if self.fine_lr else []
        if run is not None:
            values += ["random=false", f"out={self.work / run.name / 'meta_test'}"]
            if run.kind == "tune":
                values += [f"targets={json.dumps(self.validation)}", "seeds=2", "steps=500"]
        values += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return load(MetaTestConfig, self.meta_test_config, [*values, *self.overrides])

    def cost(self, run: Run) -> int:
        """Inner steps of a run and its meta-test."""
        training = self.training(run)
        steps = training.episodes * training.inner_steps * len(training.tasks)
        test = self.testing(run)
        tests = len(test.targets) * (test.seeds + 3 * run.snapshots)
        return steps + (test.steps * tests if run.kind != "pilot" else 0)

    def once(self, name: str, request: dict, make: Callable[[], dict]) -> dict:
        """The record RESULTS/NAME.json; created if missing.

        Raises:
            SystemExit: the file was created with other settings.
        """
        path = self.results / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            if different := differences(_completed(record["request"]), request):
                raise SystemExit(f"{path}: made with other settings ({different}); move it away, or use --results")
            return record
        started = time.time()
        record = {"request": request} | make()
        record |= {"seconds": round(time.time() - started), "machine": _machine()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        temporary.rename(path)
        return record


def _completed(request: dict) -> dict:
    """A stored request, with defaults for configuration keys added since."""
    models = {"training": TrainConfig, "meta_test": MetaTestConfig}
    return {name: _settings(models[name].model_validate(values)) for name, values in request.items()}


def differences(old: Any, new: Any, at: str = "") -> str:
    """The keys whose values differ, with both values; empty if none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return ", ".join(differences(old.get(key), new.get(key), f"{at}.{key}".lstrip(".")) for key in keys)
    return f"{at} is {old!r}, wanted {new!r}" if old != new else ""


def _machine() -> str:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (model or ["unknown CPU"])[0]
    return f"{device}, torch {torch.__version__}"


def _settings(config: TrainConfig | MetaTestConfig) -> dict:
    """What determines a result: the configuration without folders and device."""
    return config.model_dump(
        mode="json", exclude={"run_dir": True, "out": True, "device": True, "data": {"root"}, "checkpoint": True}
    )


def execute(study: Study, run: Run) -> dict:
    """The record of a run, computed in this process unless it is already there."""
    request = {"training": _settings(study.training(run))}
    if run.kind != "pilot":
        request["meta_test"] = _settings(study.testing(run))
    return study.once(run.name, request, partial(_compute, study, run))


def _compute(study: Study, run: Run) -> dict:
    torch.set_num_threads(1)
    config = study.training(run)
    study.work.mkdir(parents=True, exist_ok=True)
    record = {"run": asdict(run) | {"options": list(run.options)}}
    with (study.work / f"{run.name}.log").open("a") as log, redirect_stderr(log), redirect_stdout(log):
        try:
            code = train(config)
        except RunError as error:
            print(error, file=log)
            if dist.is_initialized():
                dist.destroy_process_group()
            return record | {"diverged": str(error).partition(";")[0]}
        if code == STOPPED:
            raise KeyboardInterrupt
        record |= _losses(config.run_dir)
        if run.kind == "pilot":
            return record
        record["accuracy"] = _accuracies(study.testing(run), {"phi": str(config.run_dir / "phi.safetensors")})["phi"]
        if run.snapshots:
            marks = [study.steps // 6 * n for n in (1, 2, 4)]
            files = {str(n): str(config.run_dir / "snapshots" / f"phi_{n}.safetensors") for n in marks}
            out = str(config.run_dir / "meta_test_snapshots")
            record["snapshots"] = _accuracies(study.testing(run, seeds=1, out=out), files)
    return record


def _accuracies(config: MetaTestConfig, phis: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    """Last accuracy in % per meta-test seed, by initialization and target."""
    meta_test(config, phis)
    summary = json.loads((config.out / "meta_test.json").read_text())["summary"]
    return {start: {target: cell["seeds"] for target, cell in row.items()} for start, row in summary.items()}


def _losses(run_dir: Path) -> dict:
    """Training loss per task, means over 100 inner steps each."""
    losses: dict[str, dict[int, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            losses.setdefault(record["task"], {})[record["step"]] = round(record["loss"], 4)
    steps = sorted(next(iter(losses.values())))
    return {"steps": steps, "loss": {task: [values[step] for step in steps] for task, values in losses.items()}}


def random_initialization(study: Study, name: str, **changes: Any) -> dict:
    """The record of random initialization's meta-test, with some settings changed."""
    config = study.testing(None, random=True, out=str(study.work / name), **changes)

    def compute() -> dict:
        torch.set_num_threads(1)
        study.work.mkdir(parents=True, exist_ok=True)
        with (study.work / f"{name}.log").open("a") as log, redirect_stderr(log), redirect_stdout(log):
            return {"accuracy": _accuracies(config, {})["random"]}

    return study.once(name, {"meta_test": _settings(config)}, compute)
