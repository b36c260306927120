"""One contiguous vector behind a module's parameters: a meta-update costs the same for 6 tensors or 600."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; unaligned weights slow a CPU convolution by several percent


@dataclass(frozen=True)
class Slot:
    """The position of one named tensor in a flat vector; `stride` keeps its memory format."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements


@dataclass(frozen=True)
class FlatLayout:
    """The slots of a flat vector, in order, and its length N including alignment gaps.

    Ranks with different layouts would average unrelated weights, and gloo would not notice: they compare `lines`.
    """

    slots: tuple[Slot, ...]
    numel: int
    dtype: torch.dtype

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> "FlatLayout":
        """The layout of named tensors, each aligned to 64 bytes.

        Raises:
            ValueError: no tensors, or tensors of more than one dtype.
        """
        named = list(named)
        dtypes = {tensor.dtype for _, tensor in named}
        if len(dtypes) != 1:
            found = ", ".join(sorted(map(str, dtypes))) or "no tensor"
            raise ValueError(f"a flat vector needs tensors of one dtype, found {found}")
        dtype = dtypes.pop()
        step = max(1, ALIGNMENT // dtype.itemsize)
        slots, offset = [], 0
        for name, tensor in named:
            # A dense tensor keeps its strides, channels_last included; any other becomes contiguous.
            stride = torch.empty_like(tensor, memory_format=torch.preserve_format).stride()
            slots.append(Slot(name, tuple(tensor.shape), tuple(stride), offset))
            offset += -(-tensor.numel() // step) * step
        return cls(tuple(slots), offset, dtype)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The named tensors inside `vector` [N], sharing its memory."""
        start = vector.storage_offset()
        return {slot.name: vector.as_strided(slot.shape, slot.stride, start + slot.offset) for slot in self.slots}

    def lines(self) -> list[str]:
        """One line per tensor: name, shape, stride, dtype."""
        return [f"{s.name} {list(s.shape)} stride {list(s.stride)} {self.dtype}" for s in self.slots]

    def fingerprint(self) -> str:
        """A short hash of `lines`; two ranks' vectors can be averaged if and only if it is equal."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Parts:
    """The parameters that phi leaves out, by name: every task has a `head` of its own; all tasks share where the `rest`
    starts. What requires a gradient is trained with the body and stays with the task; what does not is frozen.

    `classes`: of the model that shared values are drawn from; 1 unless phi covers the head.
    """

    head: frozenset[str] = frozenset()
    rest: frozenset[str] = frozenset()
    classes: int = 1

    @classmethod
    def around(cls, module: nn.Module, head: str | None) -> "Parts":
        """phi covers all but the submodule (or parameter) `head`; None: everything that requires a gradient."""
        named = dict(module.named_parameters())
        own = {name for name in named if head is not None and (name == head or name.startswith(f"{head}."))}
        if head is not None and not own:
            raise ValueError(f"the model has no parameter in its head {head!r}: {list(named)}")
        if own == named.keys():
            raise ValueError(f"the model has no body: every parameter is in the head {head!r}")
        fixed = {name for name, parameter in named.items() if not parameter.requires_grad}
        return cls(frozenset(own), frozenset(fixed - own))


class FlatParams:
    """A module's trained parameters as views of one vector, the body first, then what stays private to the task.

    `vector` [N + H] and `grad` [N + H] hold every trained parameter and its gradient; `body` [N] is the part that phi
    initializes. The module's own parameters become views of `vector`, so forward and backward read the flat memory.
    Frozen parameters are in neither. `start_layout` has what a new task starts from: body and rest, without the head.
    """

    def __init__(self, module: nn.Module, parts: Parts | str | None) -> None:
        """`parts` says what is not part of phi; a name is that of the head, None: everything is body.

        Raises:
            ValueError: no parameter of the module belongs to the head, or all of them do.
        """
        self.parts = parts if isinstance(parts, Parts) else Parts.around(module, parts)
        parameters = dict(module.named_parameters())
        start = [(name, p) for name, p in parameters.items() if name not in self.parts.head]
        body = [(name, p) for name, p in start if name not in self.parts.rest]
        outside = self.parts.head | self.parts.rest
        private = [(name, p) for name, p in parameters.items() if name in outside and p.requires_grad]
        self.layout = FlatLayout.of(chain(body, private))
        self.body_layout, self.start_layout = FlatLayout.of(body), FlatLayout.of(start)
        self.vector = torch.zeros(self.layout.numel, dtype=self.layout.dtype, device=body[0][1].device)
        self.grad = torch.zeros_like(self.vector)
        for name, view in self.layout.views(self.vector).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        self._named, self._parameters = parameters, [parameters[slot.name] for slot in self.layout.slots]
        self._private_start = self.vector[self.body_layout.numel :].clone()
        self._grads = list(self.layout.views(self.grad).values())

    @property
    def body(self) -> Tensor:
        """The first N elements of `vector`: the parameters that phi initializes."""
        return self.vector[: self.body_layout.numel]

    def reset_private(self) -> None:
        """What is private to the task <- where it started."""
        self.vector[self.body_layout.numel :].copy_(self._private_start)

    def start_private(self, values: Tensor) -> None:
        """What is private to the task starts at `values` [H] from the next `reset_private` on."""
        self._private_start.copy_(values)

    @torch.no_grad()
    def start_rest(self, rest: Mapping[str, Tensor]) -> None:
        """Starts what is in neither phi nor the head from shared values, one tensor per name in `parts.rest`.

        Frozen parameters share their memory, so that the learners of a rank hold them once.
        """
        for name, value in rest.items():
            if self._named[name].requires_grad:
                self._named[name].copy_(value)
            else:
                self._named[name].data = value
        self._private_start.copy_(self.vector[self.body_layout.numel :])

    def split_start(self, start: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """phi [N], and by name what phi leaves out besides the head, of a vector with `start_layout`."""
        if not self.parts.rest:
            return start, {}
        named = self.start_layout.views(start)
        phi = start.new_zeros(self.body_layout.numel)
        load_named(self.body_layout, phi, named)
        return phi, {name: named[name] for name in self.parts.rest}

    def differentiate(self, loss: Tensor) -> None:
        """`grad` <- d loss / d vector; a parameter that the loss does not use has gradient zero.

        One copy of all tensors together: accumulation into `.grad` would take one operation per tensor and a memset.
        """
        torch._foreach_copy_(self._grads, torch.autograd.grad(loss, self._parameters, materialize_grads=True))


def load_named(
    layout: FlatLayout, vector: Tensor, named: Mapping[str, Tensor], source: str = "the initialization"
) -> None:
    """Copies the layout's tensors from `named` into `vector` [N] and ignores the others; errors name `source`.

    Raises:
        ValueError: a tensor of the layout is missing or has another shape; the first one is named.
    """
    for name, view in layout.views(vector).items():
        if name not in named:
            raise ValueError(f"{source} does not fit the model: tensor {name!r} {list(view.shape)} is missing")
        if named[name].shape != view.shape:
            theirs, ours = list(named[name].shape), list(view.shape)
            raise ValueError(f"{source} does not fit the model: tensor {name!r} is {theirs}, the model has {ours}")
        view.copy_(named[name])
