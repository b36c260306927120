"""The configuration of a meta-test."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from dist_cts.config import Config
from dist_cts.data.batches import DataConfig
from dist_cts.data.few_shot import FewShotConfig
from dist_cts.data.manifest import TASK_NAME
from dist_cts.distributed.numerics import DETERMINISTIC_HELP, PRECISION_HELP, Precision
from dist_cts.learner import InnerConfig
from dist_cts.losses import LossConfig, LossField, Metric, make_loss
from dist_cts.models import ModelConfig
from dist_cts.run.config import SYNONYMS
from dist_cts.run.probes import Protocol


class FewShotTest(FewShotConfig):
    """Few-shot tasks of a target: training images of its train split, queries of the same classes of its test split."""

    queries: int = Field(15, gt=0, description="test images per class, at most")


class TargetConfig(Config):
    """One target: the name of its prepared folder or dataset, and its own loss."""

    name: str = Field(pattern=TASK_NAME)
    loss: LossField | None = Field(None, description="this target's own loss")

    @model_serializer(mode="wrap")
    def _name_alone(self, dump: Any) -> Any:
        return dump(self) if self.loss else self.name


Target = Annotated[
    TargetConfig, BeforeValidator(lambda value: value if isinstance(value, Mapping | TargetConfig) else {"name": value})
]


class MetaTestConfig(Config):
    """A meta-test; the defaults are those of the paper's section 4.2."""

    synonyms: ClassVar[dict[str, str]] = SYNONYMS | {
        **dict.fromkeys(("epochs", "num_steps", "max_steps", "inner_steps", "adaptation_steps", "k"), "steps"),
        **dict.fromkeys(("output_dir", "output", "out_dir", "run_dir", "save_dir"), "out"),
        **dict.fromkeys(("target", "task", "dataset", "datasets", "test_tasks"), "targets"),
        **dict.fromkeys(("scheduler", "lr_schedule", "lr_scheduler"), "schedule"),
        **dict.fromkeys(("seed", "random_seed", "rng_seed", "num_seeds", "runs", "repeats"), "seeds"),
        **dict.fromkeys(
            ("phi", "init", "weights", "pretrained", "checkpoint"), "an initialization is given by --phi PATH"
        ),
        "tasks": "it belongs to configurations of train; meta-test has 'targets'",
    }

    targets: list[Target] = Field(
        min_length=1, description="prepared tasks not used in meta-training: names, or {name, loss}"
    )
    random: bool = Field(True, description="also test a random initialization")
    seeds: int = Field(5, gt=0, description="number of seeds per initialization and target")
    together: int = Field(
        1, gt=0, description="adaptations that take their steps together, vectorized: faster for few-shot tasks"
    )
    protocol: Protocol = Field(
        "fine-tune",
        description="fine-tune: body and head; linear-probe: a head on frozen features; knn: nearest neighbors of them",
    )
    steps: int = Field(1000, gt=0, description="inner steps per adaptation; knn takes none")
    batch_size: int = Field(128, gt=0, description="images per step")
    schedule: Literal["multi-step", "cosine", "constant"] = Field(
        "multi-step", description="multi-step: lr x schedule_factor at 40, 70 and 90 % of the steps"
    )
    schedule_factor: float = Field(0.2, gt=0, le=1, description="for multi-step; the released code uses 0.3")
    train_limit: int = Field(0, ge=0, description="class-balanced subset of N training images per target; 0: all")
    eval_points: int = Field(5, gt=0, description="number of evaluations, evenly spaced, the last at the end")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    precision: Precision = Field("fp32", description=PRECISION_HELP)
    deterministic: bool = Field(True, description=DETERMINISTIC_HELP)
    channels_last: bool = Field(False, description="memory format of images and weights")
    out: Path | None = Field(None, description="output folder; default: meta_test beside the first phi")
    loss: LossField = LossConfig()
    few_shot: FewShotTest = FewShotTest()
    inner: InnerConfig = InnerConfig(optimizer="nesterov", lr=0.1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()

    @model_validator(mode="after")
    def _one_subset(self) -> "MetaTestConfig":
        if self.few_shot.ways and self.train_limit:
            raise ValueError("few_shot draws its own training images: leave out train_limit")
        return self

    @model_validator(mode="after")
    def _steps_to_take_together(self) -> "MetaTestConfig":
        if self.together > 1 and self.protocol != "fine-tune":
            raise ValueError(f"together={self.together} with protocol={self.protocol}: only fine-tune adapts the model")
        return self

    @model_validator(mode="after")
    def _targets_are_unique(self) -> "MetaTestConfig":
        if duplicates := [name for name, count in Counter(self.target_names).items() if count > 1]:
            raise ValueError(f"targets: duplicate name {duplicates[0]!r} in {', '.join(self.target_names)}")
        return self

    @model_validator(mode="after")
    def _one_schedule(self) -> "MetaTestConfig":
        if self.inner.schedule != "constant" or self.inner.warmup:
            raise ValueError("inner.schedule and inner.warmup belong to meta-training's episodes; set schedule instead")
        return self

    @property
    def target_names(self) -> list[str]:
        """In order."""
        return [target.name for target in self.targets]

    def loss_of(self, name: str) -> LossConfig:
        """The loss of a target, by default the meta-test's."""
        return next((target.loss for target in self.targets if target.name == name), None) or self.loss

    def metrics(self) -> dict[str, Metric]:
        """What each target reports.

        Raises:
            ValueError: as of `make_loss`.
        """
        shared = make_loss(self.loss).reported
        return {target.name: make_loss(target.loss).reported if target.loss else shared for target in self.targets}
