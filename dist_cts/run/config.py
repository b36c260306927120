"""The configuration of a meta-training run."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from dist_cts.algorithms.outer import OuterConfig
from dist_cts.algorithms.table import ALGORITHMS, MethodConfig
from dist_cts.checkpoint.schedule import CheckpointConfig
from dist_cts.config import CONFIGS, Config
from dist_cts.data.batches import DataConfig
from dist_cts.data.few_shot import FewShotConfig
from dist_cts.data.manifest import TASK_NAME
from dist_cts.distributed.numerics import DETERMINISTIC_HELP, PRECISION_HELP, Precision
from dist_cts.distributed.reducer import Reduction, Wire
from dist_cts.learner import InnerConfig, ResetConfig
from dist_cts.losses import LossConfig, LossField
from dist_cts.models import ModelConfig


class TaskConfig(Config):
    """One task: the name of its prepared folder, and its own settings."""

    name: str = Field(pattern=TASK_NAME)
    classes: int | None = Field(None, gt=0, description="checked against the manifest")
    batch_size: int | None = Field(None, gt=0, description="this task's own batch size")
    loss: LossField | None = Field(None, description="this task's own loss")
    pool: str | None = Field(None, description="few-shot: the prepared task that its episodes are drawn from")


_RANKS = "the number of ranks is torchrun's: torchrun --nproc_per_node=N"
# What other programs call these keys, see Config.synonyms; a name of a key in one section needs no entry.
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "inner_lr", "alpha", "base_lr"), "inner.lr"),
    **dict.fromkeys(("optim", "opt"), "inner.optimizer"),
    **dict.fromkeys(("wd", "l2"), "inner.weight_decay"),
    **dict.fromkeys(("bs", "batch", "batchsize", "train_batch_size", "per_device_train_batch_size"), "batch_size"),
    **dict.fromkeys(("arch", "backbone", "network", "net", "architecture", "model_name"), "model.name"),
    **dict.fromkeys(("data_dir", "data_path", "dataroot", "data_root", "dataset_dir"), "data.root"),
    "num_workers": "data.workers",
    **dict.fromkeys(("random_seed", "rng_seed"), "seed"),
    **dict.fromkeys(("cuda", "gpu", "accelerator", "use_cuda", "no_cuda"), "device"),
    **dict.fromkeys(("amp", "fp16", "bf16", "dtype", "mixed_precision", "half"), "precision"),
    **dict.fromkeys(("gpus", "ngpus", "num_gpus", "devices", "nproc", "nproc_per_node", "world_size", "ranks"), _RANKS),
    **dict.fromkeys(("nodes", "nnodes", "num_nodes"), "the number of nodes is torchrun's: torchrun --nnodes=N"),
    "base": "only a file can have a `base:`",
}


Task = Annotated[
    TaskConfig, BeforeValidator(lambda value: value if isinstance(value, Mapping | TaskConfig) else {"name": value})
]


class FewShotPool(FewShotConfig):
    """Few-shot tasks of meta-training."""

    tasks: int = Field(5, gt=0, description="few-shot tasks per episode and pool, the meta-batch")


class TrainConfig(Config):
    """A meta-training run; the defaults are those of the paper's section 4.2."""

    synonyms: ClassVar[dict[str, str]] = SYNONYMS | {
        **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs", "meta_steps", "iterations"), "episodes"),
        **dict.fromkeys(
            ("steps", "num_steps", "max_steps", "k", "inner_loop_steps", "adaptation_steps"), "inner_steps"
        ),
        **dict.fromkeys(("outer_lr", "beta", "meta_learning_rate", "outer_learning_rate", "meta_step_size"), "meta_lr"),
        **dict.fromkeys(("output_dir", "output", "out", "out_dir", "log_dir", "logdir", "save_dir"), "run_dir"),
        **dict.fromkeys(("task", "dataset", "datasets", "train_tasks"), "tasks"),
        **dict.fromkeys(("meta_batch", "meta_batch_size", "tasks_per_batch", "num_tasks"), "tasks_per_episode"),
        "algo": "algorithm",
        **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule"), "inner.schedule"),
        **dict.fromkeys(("pretrained", "weights", "init_from", "phi", "initialization"), "init"),
        **dict.fromkeys(("save_every", "save_steps", "checkpoint_every", "save_interval"), "checkpoint.every_steps"),
        **dict.fromkeys(("log_interval", "logging_steps", "print_every"), "log_every"),
        **dict.fromkeys(("val_every", "eval_interval", "eval_steps", "test_every"), "eval_every"),
        **dict.fromkeys(("resume", "resume_from", "ckpt"), "the same command resumes; --fresh starts from scratch"),
        "targets": "it belongs to configurations of meta-test; training has 'tasks'",
    }

    algorithm: str = Field("cts", description=", ".join(ALGORITHMS))
    episodes: int = Field(200, gt=0, description="M, number of episodes; each starts by resetting every learner to phi")
    inner_steps: int = Field(1000, gt=0, description="K, inner steps per episode")
    meta_lr: float = Field(0.01, gt=0, description="beta, smaller for larger K (supplement, Table 3)")
    tasks: list[Task] = Field(min_length=1, description="T prepared tasks: names, or {name, classes, batch_size, loss}")
    tasks_per_episode: int = Field(
        0, ge=0, description="N: learners, each with another of the T tasks in every episode; 0: a learner per task"
    )
    batch_size: int = Field(128, gt=0, description="images per task and inner step")
    seed: int = Field(0, description="seeds initialization, data order and augmentation")
    init: str | None = Field(
        None,
        description="phi_0, and what it leaves out: a .safetensors or .pth file, `pretrained` or a tag of the model's "
        "weights, or ResNet18_Weights.X of torchvision; default: random",
    )
    run_dir: Path | None = Field(None, description="run folder; default: runs/ + the config's path below configs/")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    precision: Precision = Field("fp32", description=PRECISION_HELP)
    deterministic: bool = Field(True, description=DETERMINISTIC_HELP)
    channels_last: bool = Field(False, description="memory format of images and weights")
    step: Literal["eager", "graph"] = Field(
        "eager", description="graph: inner steps as CUDA graphs, for small networks; not yet measured on a GPU"
    )
    compile: bool = Field(False, description="compile the model with torch.compile; changes the last bits of phi")
    placement: Literal["even", "auto"] | dict[str, list[int]] = Field(
        "even",
        description="tasks on ranks: even: deterministic; auto: by step times measured at the first start; "
        "or {task: [ranks]}",
    )
    reduction: Reduction = Field("mean", description="mean; ordered: bit-identical on any number of ranks")
    wire: Wire = Field("fp32", description="format of the reduced vectors; bf16: half the bytes, for slow networks")
    nonfinite: Literal["abort", "skip"] = Field(
        "abort", description="on NaN or Inf: abort, or skip the update and restart that learner from phi"
    )
    loss_limit: float = Field(100, gt=0, description="report a task as diverging when its loss exceeds this")
    log_every: int = Field(100, gt=0, description="write metrics every N inner steps")
    loggers: list[str] = Field(
        ["tensorboard", "curves"], description="tensorboard, curves (curves.png at the end), wandb, trackio"
    )
    project: str = Field("dist_cts", description="project of the run in W&B and Trackio")
    eval_every: int = Field(
        0, ge=0, description="evaluate every task on its test split every N inner steps; 0 disables"
    )
    check_every: int = Field(1000, gt=0, description="verify every N inner steps that phi is identical on all ranks")
    snapshot_every: int = Field(0, ge=0, description="write snapshots/phi_STEP every N inner steps; 0 disables")
    timeout_seconds: float = Field(120, gt=0, description="collective timeout in seconds")
    max_minutes: float = Field(0, ge=0, description="save a checkpoint and exit after N minutes; 0 disables")
    loss: LossField = LossConfig()
    few_shot: FewShotPool = FewShotPool()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    method: MethodConfig = MethodConfig()
    reset: ResetConfig = ResetConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def _every_pool_gives_tasks(cls, values: Any) -> Any:
        """With few_shot, [omniglot] becomes omniglot-1, omniglot-2, ..., each with pool omniglot."""
        if not isinstance(values, Mapping) or not values.get("few_shot") or not isinstance(values.get("tasks"), list):
            return values
        try:
            few_shot = FewShotPool.model_validate(values["few_shot"])
            tasks = TypeAdapter(list[Task]).validate_python(values["tasks"])
        except ValidationError:  # of a field: its own validation reports it
            return values
        if not few_shot.ways:
            return values
        expanded = []
        for task in tasks:
            if task.pool is None:
                names = (f"{task.name}-{number}" for number in range(1, few_shot.tasks + 1))
                expanded += [task.model_copy(update={"name": name, "pool": task.name}) for name in names]
            else:  # of a resolved configuration
                expanded.append(task)
        return {**values, "tasks": expanded}

    @model_validator(mode="after")
    def _few_shot_fits(self) -> "TrainConfig":
        if not self.few_shot.ways:
            return self
        if not self.reset.head:
            raise ValueError("few_shot draws other classes for every episode: set reset.head=true")
        if self.eval_every:
            raise ValueError("few_shot tasks have no test split: set eval_every=0 and use the meta-test")
        return self

    @model_validator(mode="after")
    def _the_pool_fits(self) -> "TrainConfig":
        N, T = self.tasks_per_episode, len(self.tasks)
        if not N:
            return self
        if N > T:
            raise ValueError(f"tasks_per_episode={N} exceeds the {T} tasks; set at most {T}, or 0 for all in every one")
        if self.few_shot.ways:
            raise ValueError("few_shot draws its own tasks: set few_shot.tasks and leave out tasks_per_episode")
        given = {
            "algorithm=accurate": self.algorithm == "accurate",  # copies the whole state at every episode
            f"placement={self.placement}": self.placement != "even",
            f"eval_every={self.eval_every}": self.eval_every,
            f"step={self.step}": self.step == "graph",
            "a task's own loss": any(task.loss for task in self.tasks),
            "model.rest=private": self.model.body is not None and self.model.rest == "private",
        }
        if refused := [key for key, value in given.items() if value]:
            raise ValueError(
                f"tasks_per_episode={N}: learners change their tasks, which {refused[0]} does not allow; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> "TrainConfig":
        if duplicates := [name for name, count in Counter(self.task_names).items() if count > 1]:
            raise ValueError(f"tasks: duplicate task name {duplicates[0]!r} in {', '.join(self.task_names)}")
        return self

    @model_validator(mode="after")
    def _joint_training_is_linear(self) -> "TrainConfig":
        optimizer = self.inner.optimizer
        if self.algorithm == "mtl" and optimizer.startswith("adam") and len(self.tasks) > 1:
            raise ValueError(
                f"algorithm=mtl with inner.optimizer={optimizer}: the mean of the tasks' Adam steps is not a step of "
                "joint training; use sgd or nesterov"
            )
        return self

    @model_validator(mode="after")
    def _joint_training_has_no_outer_rule(self) -> "TrainConfig":
        if self.algorithm == "mtl" and self.outer != OuterConfig():
            raise ValueError("algorithm=mtl is joint training, phi is the mean of theta: leave section outer out")
        return self

    @model_validator(mode="after")
    def _a_frozen_body_has_a_gradient(self) -> "TrainConfig":
        gradient = self.algorithm in ("fomaml", "fomaml++") or self.method.meta_gradient == "fomaml"
        if self.inner.freeze_body and not gradient:
            raise ValueError(
                f"inner.freeze_body with algorithm={self.algorithm}: the difference phi - theta stays 0; use fomaml, "
                "fomaml++ or method.meta_gradient=fomaml"
            )
        return self

    @model_validator(mode="after")
    def _the_inner_schedule_fits(self) -> "TrainConfig":
        inner = self.inner
        if inner.warmup >= self.inner_steps:
            raise ValueError(f"inner.warmup={inner.warmup} must be below inner_steps={self.inner_steps}")
        if self.step == "graph" and (inner.warmup or inner.schedule != "constant"):
            raise ValueError("step=graph records the learning rate: set inner.schedule=constant and inner.warmup=0")
        return self

    @property
    def task_names(self) -> list[str]:
        """In task order."""
        return [task.name for task in self.tasks]

    @property
    def learner_names(self) -> list[str]:
        """In order: those of the tasks, or of `tasks_per_episode` learners that draw their tasks."""
        return [f"learner-{number}" for number in range(1, self.tasks_per_episode + 1)] or self.task_names

    def batch_size_of(self, task: TaskConfig) -> int:
        """The task's batch size, by default the run's."""
        return task.batch_size or self.batch_size

    def loss_of(self, task: TaskConfig) -> LossConfig:
        """The task's loss, by default the run's."""
        return task.loss or self.loss

    def with_run_dir(self, file: Path | None = None) -> "TrainConfig":
        """This configuration with its default run folder filled in: runs/ + the path of `file` below configs/.

        configs/ is the package's or the one in the working directory. For a file elsewhere, runs/ + its name; without
        a file, runs/ + the algorithm.
        """
        if self.run_dir is not None:
            return self
        path = Path(self.algorithm) if file is None else file.resolve()
        folders = [folder for folder in (CONFIGS, Path("configs").resolve()) if path.is_relative_to(folder)]
        path = path.relative_to(folders[0]) if folders else Path(path.name)
        return self.model_copy(update={"run_dir": Path("runs") / (path if file is None else path.with_suffix(""))})
