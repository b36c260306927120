"""The manifest of a .beton file: the .json file beside it, which says what the .beton file holds."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from dist_cts.atomic import replace_file, seal
from dist_cts.config import Config
from dist_cts.config_faults import words

TASK_NAME = r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$"  # a plain folder name: no separators, not . or ..
AGAIN = "prepare the task again with `dist-cts prepare`"


class Manifest(Config):
    """The contents of one .beton file. Both splits of a task carry the mean and std of its train split."""

    name: str
    split: str
    count: int = Field(gt=0)
    classes: int = Field(gt=0)
    class_names: list[str]
    pixels: int = Field(gt=0, le=4096)
    channels: Literal[1, 3]  # 1: greyscale source, stored as three equal channels
    mean: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=3, max_length=3)]  # per channel
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=3, max_length=3)]
    mode: Literal["raw", "jpg"]
    source: str  # the dataset and the options that it was prepared with
    skipped: tuple[str, ...] = ()  # one line per image that was left out because it cannot be decoded
    bytes: int = Field(gt=0)
    sha256: str
    format: Literal[1] = 1

    @model_validator(mode="after")
    def _names_match(self) -> "Manifest":
        if len(self.class_names) != self.classes:
            raise ValueError(f"{self.classes} classes but {len(self.class_names)} class names")
        return self


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the .json file `path`, atomically and sealed against later changes."""
    values = manifest.model_dump(mode="json")
    replace_file(path, json.dumps(values | {"seal": seal(values)}, indent=1).encode())


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a split; `path` names its .beton or its .json file.

    Raises:
        FileNotFoundError: the manifest does not exist.
        ValueError: it is not a valid manifest, or was modified.
    """
    path = Path(path).with_suffix(".json")
    try:
        values = json.loads(path.read_bytes())
        written = values.pop("seal", None) if isinstance(values, dict) else None
        manifest = Manifest.model_validate(values)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: manifest not found; {AGAIN}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ": ".join((*map(str, fault["loc"]), words(fault)))
        raise ValueError(f"{path}: not a valid manifest: {where}; {AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid manifest: {error}; {AGAIN}") from None
    if written not in (None, seal(values)):
        raise ValueError(f"{path}: modified since it was written; {AGAIN}")
    return manifest
