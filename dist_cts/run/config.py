"""The configuration of a meta-training run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dist_cts.algorithms.table import ALGORITHMS, MethodConfig
from dist_cts.checkpoint.manager import CheckpointConfig
from dist_cts.config import Config
from dist_cts.data.batches import DataConfig
from dist_cts.distributed.reducer import Reduction
from dist_cts.learner import InnerConfig, ResetConfig
from dist_cts.models import ModelConfig


class TaskConfig(Config):
    """One task: the name of its prepared folder, and what differs from the other tasks."""

    name: str
    classes: int | None = Field(None, gt=0, description="checked against the manifest")
    batch_size: int | None = Field(None, gt=0, description="this task's own batch size")


Task = Annotated[TaskConfig, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]


class TrainConfig(Config):
    """A meta-training run; the defaults are the paper's section 4.2."""

    algorithm: str = Field("cts", description=", ".join(ALGORITHMS))
    episodes: int = Field(200, gt=0, description="M, times that every learner starts from phi")
    inner_steps: int = Field(1000, gt=0, description="K, inner steps an episode")
    meta_lr: float = Field(0.01, gt=0, description="beta; it falls as K grows (supplement, Table 3)")
    tasks: list[Task] = Field(min_length=1, description="T prepared tasks: names, or {name, classes, batch_size}")
    batch_size: int = Field(128, gt=0, description="images of one task in one inner step")
    seed: int = Field(0, description="phi_0, the heads and every sample follow from it")
    init: str | None = Field(
        None, description="phi_0: a .safetensors or .pth, or torchvision's ResNet18_Weights.X; default: from the seed"
    )
    run_dir: Path | None = Field(None, description="the run's folder; default runs/ + the config's path below configs/")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; theta, phi, the mean stay fp32")
    channels_last: bool = Field(False, description="memory format of images and weights")
    placement: Literal["even", "auto"] | dict[str, list[int]] = Field(
        "even",
        description="tasks on ranks: even, where nothing depends on a measurement; auto, by step times measured at the "
        "first start; or {task: [ranks]}",
    )
    reduction: Reduction = Field("mean", description="mean, or ordered: the same bits on any number of ranks")
    nonfinite: Literal["abort", "skip"] = Field("abort", description="skip: restart that learner from phi, go on")
    loss_limit: float = Field(100, gt=0, description="a task whose loss exceeds it is reported as diverging")
    log_every: int = Field(100, gt=0, description="inner steps between two records of metrics.jsonl")
    eval_every: int = Field(0, ge=0, description="inner steps between two tests of each theta; 0: never")
    check_every: int = Field(1000, gt=0, description="inner steps between two comparisons of phi over the ranks")
    snapshot_every: int = Field(0, ge=0, description="inner steps between two files phi_STEP in snapshots/; 0: never")
    timeout_seconds: float = Field(120, gt=0, description="how long a rank waits for a lost one")
    max_minutes: float = Field(0, ge=0, description="stop with a checkpoint after so long; 0: never")
    inner: InnerConfig = InnerConfig()
    method: MethodConfig = MethodConfig()
    reset: ResetConfig = ResetConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
