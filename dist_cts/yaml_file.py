"""YAML files and `section.key=value` overrides: their values, and the place that each value comes from."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "command line"
Places = dict[tuple[str, ...], str]  # path of a value, such as ("tasks", "0", "name"), to FILE:LINE or COMMAND_LINE


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number, as YAML 1.2 does, and refuses what is always a mistake."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                problem = f"duplicate key {key.value!r}, first on line {lines[key.value]}; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            raise ValueError(f"an integer of {value.bit_length()} bits does not fit in int64")
        return value

    def construct_none(self, node: yaml.ScalarNode) -> None:
        problem = "None is not a YAML value; write null, or quote the text: 'None'"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))
_Loader.add_implicit_resolver("!None", re.compile("^None$"), ["N"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("!None", _Loader.construct_none)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: numbers, strings, lists and dicts; reading executes nothing.

    Raises:
        FileNotFoundError, ValueError: file not found, or not valid YAML; the message names it.
    """
    return read_placed(path)[0]


def read_placed(path: Path) -> tuple[Any, Places]:
    """The content of a YAML file, and the place of every value in it; errors as in `read_yaml`."""
    try:
        return _load(path.read_text(), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"config file not found: {path} (working directory: {Path.cwd()})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in problem:
            problem += "; indent with spaces, not tabs"
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: not a YAML file: {problem}") from None
    except Exception as error:  # PyYAML raises many types: for month 13, `!!bool maybe`, a thousand brackets
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None


def read_values(path: Path | None, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Places]:
    """The values of a file (None: no file), extended by its `base:` files and overridden, and their places.

    Raises:
        FileNotFoundError: the file or a `base:` file is not found.
        ValueError: one of them or an override is invalid.
    """
    values, places = ({}, {}) if path is None else _with_base(path)
    for override in overrides:
        given, given_places = _override(override)
        _merge(values, given)
        places |= given_places
    return values, places


def _load(text: str, where: Path | None = None) -> tuple[Any, Places]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        value = loader.construct_document(node)
    finally:
        loader.dispose()
    return value, dict(_places(node, where))


def _places(node: yaml.Node, where: Path | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """The place of every value below a node; of an alias's target only the first, as aliases may expand endlessly."""
    seen, left = set(), [((), node, node)]
    while left:
        path, node, marked = left.pop()
        yield path, COMMAND_LINE if where is None else f"{where}:{marked.start_mark.line + 1}"
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            left += [((*path, str(key.value)), value, key) for key, value in node.value]
        else:
            left += [((*path, str(index)), value, value) for index, value in enumerate(node.value)]


def _with_base(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Places]:
    values, places = read_placed(path)
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    if path.resolve() in seen:
        raise ValueError(f"{path}: circular `base:` chain; remove one `base:`")
    if "base" not in values:
        return values, places
    base = path.parent / str(values.pop("base"))
    if not base.is_file():  # reading a pipe would block
        raise FileNotFoundError(f"{places[('base',)]}: base file not found, or not a regular file: {str(base)!r}")
    merged, merged_places = _with_base(base, (*seen, path.resolve()))
    _merge(merged, values)
    return merged, merged_places | places


def _override(override: str) -> tuple[dict[str, Any], Places]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        expected = "expected section.key=value, without spaces, such as inner.lr=0.1"
        if override.endswith((".yaml", ".yml")):
            expected = f"to use this configuration, write --config {override}"
        elif override.endswith((".safetensors", ".pt", ".pth")):
            expected = f"to meta-test this phi, write --phi {override}; to train from it, init={override}"
        raise ValueError(f"{COMMAND_LINE}: override {override!r}: {expected}")
    try:
        value, places = _load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{COMMAND_LINE}: override {override!r}: {error.problem or 'not valid YAML'}") from None
    except Exception as error:
        raise ValueError(
            f"{COMMAND_LINE}: override {override!r}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    steps = tuple(key.strip().split("."))
    for part in reversed(steps):
        value = {part: value}
    above = {steps[:depth]: COMMAND_LINE for depth in range(1, len(steps) + 1)}
    return value, above | {(*steps, *path): place for path, place in places.items()}


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), str):
            into[key] = {"name": into[key]}  # `loss: mse`
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
