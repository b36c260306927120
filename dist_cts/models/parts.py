"""Which parameters phi covers: patterns on their names, and the words norm, head and lora."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BeforeValidator
from torch import nn

from dist_cts.flat import Parts

Patterns = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
ADAPTERS = ("_lora_down", "_lora_up")  # how the names of LoRA's matrices end
Treatment = Literal["private", "frozen"]


def split(
    model: nn.Module,
    head_modules: Collection[str],
    classes: int,
    body: Sequence[str] | None,
    *,
    rest: Treatment,
    head: Treatment,
) -> Parts:
    """The parts of a model; what is frozen no longer requires a gradient.

    Args:
        head_modules: the names of the modules that produce the outputs.
        classes: C, that the model was built for.
        body: patterns of the parameters that phi covers; None: all but the head, or with LoRA only its matrices.
        rest: what becomes of parameters that belong neither to phi nor to the head.
        head: what becomes of the head, unless phi covers it.

    Raises:
        ValueError: a pattern matches no parameter, or no parameter is left for phi.
    """
    parameters = dict(model.named_parameters())
    words = words_of(model, head_modules)
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    chosen = words["lora"] or trainable - words["head"]
    if body:
        chosen = select(body, parameters, words, start=chosen, key="model.body")
    if not chosen:
        raise ValueError(f"model.body={body}: no parameter is left for phi")
    if fixed := chosen - trainable:
        raise ValueError(f"model.body={body}: the model itself keeps {min(fixed)} fixed; exclude it: -{min(fixed)}")
    own = words["head"] - chosen
    others = parameters.keys() - chosen - own
    for name in (own if head == "frozen" else set()) | (others if rest == "frozen" else set()):
        parameters[name].requires_grad_(False)
    return Parts(frozenset(own), frozenset(others), classes if words["head"] & chosen else 1)


def words_of(model: nn.Module, head_modules: Collection[str]) -> dict[str, set[str]]:
    """The parameters of normalization layers, of the head and of LoRA, by name."""
    words: dict[str, set[str]] = {"norm": set(), "head": set(), "lora": set()}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(module_name, recurse=False):
            if any(name.startswith(f"{head}.") or name == head for head in head_modules):
                words["head"].add(name)
            if "norm" in type(module).__name__.lower():
                words["norm"].add(name)
            if name.endswith(ADAPTERS):
                words["lora"].add(name)
    return words


def select(
    patterns: Sequence[str], names: Collection[str], words: Mapping[str, set[str]], *, start: Collection[str], key: str
) -> set[str]:
    """The names that the patterns select, in order: `PATTERN` adds names, `-PATTERN` takes them away.

    A pattern is one of `words` or as in the shell (*, ?, [ab]). If the first one takes away, it does so from `start`.

    Raises:
        ValueError: a pattern matches no name; the message has the nearest ones, and `key`.
    """
    selected = set(start) if patterns[0].startswith("-") else set()
    for pattern in patterns:
        bare = pattern.removeprefix("-")
        found = words[bare] if bare in words else {name for name in names if fnmatchcase(name, bare)}
        if not found:
            near = difflib.get_close_matches(bare, [*words, *names], n=3, cutoff=0)
            raise ValueError(f"{key}: {pattern!r} matches no parameter of the model; nearest: {', '.join(near)}")
        selected = selected - found if pattern.startswith("-") else selected | found
    return selected
