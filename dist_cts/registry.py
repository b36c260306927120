"""Rows of the open tables (MODELS, LOSSES, ALGORITHMS) by name, and the options that a configuration gives them."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dist_cts.config_faults import words

Row = TypeVar("Row")
OWN = "--import MODULE adds your own"


def lookup(key: str, name: str, table: Mapping[str, Row]) -> Row:
    """The row called `name` of the table that the config key `key` selects from.

    Raises:
        ValueError: there is none; names the nearest ones.
    """
    if name not in table:
        raise ValueError(f"{key}={name!r}: unknown; {nearest(name, table)}; {OWN}")
    return table[name]


def check_options(key: str, function: Callable, given: Mapping[str, Any], skip: int = 0) -> None:
    """Checks the options in section `key` against the parameters of `function` after the first `skip`.

    Raises:
        ValueError: an unknown option, or a value that does not fit its annotation.
    """
    if not given:  # a function in C has no signature to inspect
        return
    parameters = dict(list(inspect.signature(function).parameters.items())[skip:])
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in given.items():
        if name not in parameters:
            if takes_any:
                continue
            raise ValueError(f"{key}.{name}={value!r}: unknown; {nearest(name, parameters)}")
        annotation = parameters[name].annotation
        if annotation is inspect.Parameter.empty or isinstance(annotation, str):
            continue
        try:
            TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{key}.{name}={value!r}: {words(error.errors()[0])}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """For an error message: the known names that are near to `name`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known) or 'none'}"
