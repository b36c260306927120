"""Configs: YAML files and `section.key=value` overrides, read into frozen, strict models.

Each model is defined next to the code that it configures and derives from `Config`. A YAML file holds only what
differs from the defaults and may extend another file, named by `base:`. A partial section keeps the defaults of the
field that it belongs to: `inner: {lr: 0.05}` of a meta-test keeps the meta-test's optimizer.
"""

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Config(BaseModel):
    """A section of a config: immutable; unknown keys, NaN and Inf are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_the_sections_defaults(cls, values: Any) -> Any:
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return _overlay(defaults, values) if isinstance(values, Mapping) else values


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
FAULTS = 10  # listed per error message
_shown = reprlib.Repr()  # shortens invalid values: YAML aliases may expand without limit
_shown.maxstring = _shown.maxother = 200
_shown.maxlevel = 2


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number, as YAML 1.2 does and PyYAML's 1.1 does not."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            raise ValueError(f"an integer of {value.bit_length()} bits does not fit in int64")
        return value


_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load(model: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Reads `path` (YAML; None: only the defaults) and applies overrides such as `inner.lr=0.01`.

    Raises:
        FileNotFoundError: the file or its `base:` file is not found.
        ValueError: unknown keys, wrong types or values, or invalid YAML; one line that lists up to FAULTS faults.
    """
    where = path if path is not None else "the config"
    try:
        values = _read(Path(path)) if path is not None else {}
        for override in overrides:
            _merge(values, _parse_override(override))
        return model.model_validate(values)
    except RecursionError:
        raise ValueError(f"{where}: recursive YAML alias; write the value out") from None
    except ValidationError as error:
        faults = "; ".join(_explain(model, fault) for fault in error.errors()[:FAULTS])
        raise ValueError(f"{where}: {faults}") from None


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
    known = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in sorted(CONFIGS.rglob("*.yaml"))]
    near = difflib.get_close_matches(name.removeprefix("configs/").removesuffix(".yaml"), known, n=3, cutoff=0)
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
        section = _submodel(field.annotation)
        if section is not None:
            yield from describe(section, f"{prefix}{name}.", default if isinstance(default, Config) else None)
        else:
            yield f"  {f'{prefix}{name} = {default}':<44} {field.description or ''}".rstrip()


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: numbers, strings, lists and dicts; reading executes nothing.

    Raises:
        FileNotFoundError, ValueError: file not found, or not valid YAML; the message names it.
    """
    try:
        return yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"config file not found: {path} (working directory: {Path.cwd()})") from None
    except Exception as error:  # PyYAML raises many types: for month 13, `!!bool maybe`, a thousand brackets
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    if path.resolve() in seen:
        raise ValueError(f"{path}: circular `base:` chain; remove one `base:`")
    if "base" not in values:
        return values
    base = path.parent / str(values.pop("base"))
    if not base.is_file():  # reading a pipe would block
        raise FileNotFoundError(f"{path}: base file not found, or not a regular file: {str(base)!r}")
    merged = _read(base, (*seen, path.resolve()))
    _merge(merged, values)
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except Exception:
        raise ValueError(f"override {override!r}: {text!r} is not valid YAML") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), str):
            into[key] = {"name": into[key]}  # `loss: mse`
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(model: type[Config], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}"
        return f"unknown key {_shown.repr(key)}; {hint}"
    if fault["type"] == "missing":
        return f"{key!r} is required"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key!r} is {_shown.repr(fault['input'])}: {message}" if key else message


def _known_keys(model: type[Config], path: Sequence[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        section = _submodel(field.annotation) if field else None
        if section is not None:
            model = section
    return list(model.model_fields)


def _submodel(annotation: Any) -> type[Config] | None:
    """The config class inside an annotation such as `InnerConfig`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Config) else None
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(filter(None, map(_submodel, typing.get_args(annotation))), None)
    return None
