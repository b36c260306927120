"""Configs: YAML files and `section.key=value` overrides, read into frozen, strict models.

Each model is defined next to the code that it configures and derives from `Config`. A YAML file holds only what
differs from the defaults and may extend another file, named by `base:`. A partial section keeps the defaults of the
field that it belongs to: `inner: {lr: 0.05}` of a meta-test keeps the meta-test's optimizer.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import expanduser, expandvars
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from dist_cts.config_faults import explain, in_yaml, place_of, section_of
from dist_cts.yaml_file import read_values


class _OwnWords(type(BaseModel)):
    """Errors of `TrainConfig(...)` in Python read as those of a YAML file do; nested sections are not called."""

    def __call__(cls, *arguments: Any, **values: Any) -> Any:
        try:
            return super().__call__(*arguments, **values)
        except ValidationError as error:
            raise ValueError(explain(cls, error, values, {}, cls.__name__)) from None


class Config(BaseModel, metaclass=_OwnWords):
    """A section of a config: immutable; unknown keys, NaN and Inf are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    synonyms: ClassVar[Mapping[str, str]] = {}  # what other programs call a key: the key, or a sentence

    @model_validator(mode="before")
    @classmethod
    def _keep_the_sections_defaults(cls, values: Any) -> Any:
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return _overlay(defaults, values) if isinstance(values, Mapping) else values

    @field_validator("*")
    @classmethod
    def _expand_home_and_variables(cls, value: Any) -> Any:
        # The shell expands ~ neither in a YAML file nor behind `data.root=`.
        return Path(expanduser(expandvars(value))) if isinstance(value, Path) else value


def _overlay(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every partial section completed from its default section."""
    return {key: _complete(defaults.get(key), value) for key, value in values.items()}


def _complete(default: Any, value: Any) -> Any:
    if not isinstance(default, Config) or not isinstance(value, Mapping):
        return value
    return dict(default) | _overlay(dict(default), value)


CONFIGS = (Path(__file__).parent / "configs").resolve()  # in a checkout a link to configs/
HELP = "YAML file with what differs from the defaults, or the name of one in configs/ such as paper/cts"

C = TypeVar("C", bound=Config)


def load(model: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Reads `path` (YAML; None: only the defaults) and applies overrides such as `inner.lr=0.01`.

    Raises:
        FileNotFoundError: the file or its `base:` file is not found.
        ValueError: unknown keys, wrong types or values, or invalid YAML; one line that names the place of each fault.
    """
    where = path if path is not None else "the config"
    try:
        values, places = read_values(None if path is None else Path(path), overrides)
        return model.model_validate(values)
    except RecursionError:
        raise ValueError(f"{where}: recursive YAML alias; write the value out") from None
    except ValidationError as error:
        raise ValueError(explain(model, error, values, places, where)) from None


@contextmanager
def blamed(path: str | Path | None, overrides: Sequence[str] = ()) -> Iterator[None]:
    """A block that uses a loaded config: its errors that begin with a key, such as `model.name='x': ...`, get a place.

    Raises:
        ValueError: as in the block, with FILE:LINE or `command line` in front.
    """
    try:
        yield
    except ValueError as error:
        place = place_of(str(error), read_values(None if path is None else Path(path), overrides)[1])
        if place is None:
            raise
        raise ValueError(f"{place}: {error}") from error


def find(name: str) -> Path:
    """The file of a configuration that is given as a path, or as its name below configs/, such as paper/cts.

    Raises:
        FileNotFoundError: there is neither; names the nearest configurations that there are.
    """
    path, shipped = Path(name), CONFIGS / f"{name}.yaml"
    if path.exists() and not path.is_dir():
        return path
    if shipped.is_file():
        return shipped
    if path.is_dir():
        file = path / "config.yaml"
        hint = f"; did you mean {file}?" if file.is_file() else ""
        raise FileNotFoundError(f"--config {name}: a folder, expected a YAML file or a name below configs/{hint}")
    beside = [str(file) for file in sorted(path.parent.glob("*.yaml")) if CONFIGS not in file.resolve().parents]
    known = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in sorted(CONFIGS.rglob("*.yaml"))]
    near = difflib.get_close_matches(name, beside, n=2)
    near += difflib.get_close_matches(name.removeprefix("configs/").removesuffix(".yaml"), known, n=3, cutoff=0)
    raise FileNotFoundError(
        f"config file not found: {name} (working directory: {Path.cwd()}); nearest configurations: {', '.join(near)}"
    )


def save(config: Config, path: str | Path) -> None:
    """Writes the resolved config, every key in it, as YAML."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def describe(model: type[Config], prefix: str = "", defaults: Config | None = None) -> Iterator[str]:
    """One line per key of a config, `key = default   description`: the body of `--help`.

    `defaults`: the section whose values are the defaults; None: the field defaults of `model`.
    """
    for name, field in model.model_fields.items():
        required = defaults is None and field.is_required()
        default = "(required)" if required else field.default if defaults is None else getattr(defaults, name)
        section = section_of(field.annotation)
        if section is not None and isinstance(default, Config):
            yield from describe(section, f"{prefix}{name}.", default)
        else:
            yield f"  {f'{prefix}{name} = {in_yaml(default)}':<44} {field.description or ''}".rstrip()
