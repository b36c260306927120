"""What is wrong with a configuration, in one line: the place of the value, the value, what was expected, the remedy."""

import difflib
import json
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_cts.yaml_file import Places

FAULTS = 10  # listed per message
_shown = reprlib.Repr()  # shortens invalid values: YAML aliases may expand without limit
_shown.maxstring = _shown.maxother = 200
_shown.maxlevel = 2
# What was expected, by pydantic's type of the fault or the first word of that type.
_EXPECTED = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "too_short": "{min_length} or more, found {actual_length}",
    "too_long": "{max_length} or fewer, found {actual_length}",
    "string_pattern_mismatch": "a plain folder name, without / and not . or ..",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text (quote it if it looks like a number or a date)",
    "path": "a path",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [a, b]",
    "dict": "keys with values, such as {{a: 1}}",
    "model": "a section with keys",
    "invalid": "keys that are text",
}
_VALUES = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16", "momentum": "sgd", "adamw": "adam"}
_KEY = re.compile(r"(?:rank \d+: )?([\w.]+)(?:=|: | is )")


def explain(model: type[BaseModel], error: ValidationError, values: Any, places: Places, where: object) -> str:
    """The faults of `values` in one line; `where` is named for those that no place is known of.

    `model.synonyms`, where it exists, maps names that other programs use to a key of this model or to a sentence.
    """
    lines: list[str] = []
    for path, text in _merged(model, error.errors(include_url=False), values)[:FAULTS]:
        place = _place(path, places) if path else place_of(text, places)
        lines.append(f"{place or where}: {text}")
    first = lines[0].partition(": ")[0]
    return "; ".join(lines[:1] + [line.removeprefix(f"{first}: ") for line in lines[1:]])


def words(fault: Mapping[str, Any]) -> str:
    """What was expected instead of a single value, from one of pydantic's `errors()`."""
    kind = fault["type"]
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    if kind == "missing":
        return "missing"
    if kind == "recursion_loop":
        return "recursive YAML alias; write the value out"
    expected = _EXPECTED.get(kind) or _EXPECTED.get(kind.partition("_")[0])
    return f"expected {expected.format(**fault.get('ctx', {}))}" if expected else "not a valid value"


def place_of(text: str, places: Places) -> str | None:
    """The place of the value that a message is about, if it begins with a key: `model.name='vgg': ...`."""
    key = _KEY.match(text)
    return places.get(tuple(key[1].split("."))) if key else None


def in_yaml(value: Any, show: Callable[[Any], str] = str) -> str:
    """A scalar as it is written in YAML: null, true, false; anything else by `show`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value) if isinstance(value, date) else show(value)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The config class inside an annotation such as `InnerConfig` or `X | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, typing.Annotated):
        return next(filter(None, map(section_of, typing.get_args(annotation))), None)
    return None


def _merged(model: type[BaseModel], faults: Iterable[Mapping], values: Any) -> list[tuple[tuple[Any, ...], str]]:
    """Path and text of each fault; the alternatives of a union are one fault."""
    texts: dict[tuple[Any, ...], str] = {}
    for fault in faults:
        path = _path(fault, values)
        text = _text(model, path, fault)
        before = texts.get(path, text)
        one = text == before or "did you mean" in before
        texts[path] = before if one else f"{before}, or {text.rpartition('expected ')[2]}"
    nested = {path[:depth] for path in texts for depth in range(1, len(path))}  # of a union: the more specific fault
    return [(path, text) for path, text in texts.items() if path not in nested]


def _path(fault: Mapping[str, Any], values: Any) -> tuple[Any, ...]:
    """The location of a fault, without the names that pydantic gives to the alternatives of a union."""
    path, loc = [], fault["loc"]
    for part in loc:
        try:
            values = values[part]
        except (LookupError, TypeError):
            if fault["type"] != "missing" or part != loc[-1]:
                continue
        path.append(part)
    return tuple(path)


def _text(model: type[BaseModel], path: Sequence[Any], fault: Mapping[str, Any]) -> str:
    key = _dotted(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {_shown.repr(key)}; {_hint(model, path)}"
    if fault["type"] == "missing":
        return f"{key!r} is required; add it"
    text, value = words(fault), fault["input"]
    if not path:
        return text
    field = _field(model, path)
    if field is not None and type(None) in typing.get_args(field) and text.startswith("expected "):
        text += ", or null"
    if fault["type"] == "list_type" and isinstance(value, str) and value.isprintable():
        text = f"expected a list; did you mean [{value}]?"
    choices = re.findall(r"'([^']*)'", text) if fault["type"] == "literal_error" else []
    plain = value.lower() if isinstance(value, str) else ""
    if close := difflib.get_close_matches(_VALUES.get(plain, plain), choices, n=1):
        text += f"; did you mean {close[0]!r}?"
    if fault["type"].startswith("model") and (section := section_of(field)):
        fits = [name for name in section.model_fields if _accepts(section, name, value)]
        text += f"; did you mean {key}.{fits[0]}={in_yaml(value)}?" if fits else f": {', '.join(section.model_fields)}"
    return f"{key} is {in_yaml(value, _shown.repr)}: {text}"


def _hint(model: type[BaseModel], path: Sequence[Any]) -> str:
    """What an unknown key may have meant: its synonym, the same key of another section, a similar key."""
    *above, name = map(str, path)
    parent = _model_at(model, path[:-1])
    keys = list(_keys(model))
    plain = name.lower().replace("-", "_")
    meant = getattr(model, "synonyms", {}).get(plain)
    if meant is None and parent is model:
        meant = next((key for key in keys if key.rpartition(".")[2] == plain), None)
    if meant is not None:
        return f"did you mean {meant!r}?" if meant in keys else meant
    here = list(parent.model_fields)
    prefix = "" if parent is model or isinstance(path[-2], int) else f"{_dotted(path[:-1])}."
    close = [prefix + key for key in difflib.get_close_matches(plain, here, n=1)]
    close = close or difflib.get_close_matches(".".join([*above, name]), keys, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if parent is model:
        return hint.strip() or ("--help lists all keys" if len(here) > 12 else f"keys: {', '.join(here)}")
    owner = f"a {str(path[-3]).removesuffix('s')}" if isinstance(path[-2], int) else _dotted(path[:-1])
    return f"{hint}keys of {owner}: {', '.join(here)}"


def _place(path: Sequence[Any], places: Places) -> str | None:
    """The place of a value, or of the innermost section around it; a missing key of the top level has none."""
    steps = tuple(map(str, path))
    return next((places[steps[:depth]] for depth in range(len(steps), 0, -1) if steps[:depth] in places), None)


def _dotted(path: Sequence[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _field(model: type[BaseModel], path: Sequence[Any]) -> Any:
    """The annotation of the field at a path; None if there is none."""
    parent = _model_at(model, path[:-1])
    field = parent.model_fields.get(str(path[-1]))
    return field.annotation if field else None


def _model_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    for part in path:
        field = model.model_fields.get(str(part))
        inside = _model_inside(field.annotation) if field else None
        model = inside or model
    return model


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    """As `section_of`, but also inside lists."""
    found = section_of(annotation)
    return found or next(filter(None, map(_model_inside, typing.get_args(annotation))), None)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = section_of(field.annotation)
        if section is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _accepts(section: type[BaseModel], name: str, value: Any) -> bool:
    if not isinstance(value, str | int | float) or not str(value).isprintable():  # an alias may expand without limit
        return False
    try:
        section.model_validate({name: value})
    except ValueError:
        return False
    return True
