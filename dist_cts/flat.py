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


class FlatParams:
    """A module's parameters as views of one vector, the body first, then the head.

    `vector` [N + H] and `grad` [N + H] hold every parameter and its gradient; `body` [N] is the part that phi
    initializes. The module's own parameters become views of `vector`, so forward and backward read the flat memory.
    """

    def __init__(self, module: nn.Module, head: str | None) -> None:
        """`head` names the submodule (or parameter) that is not part of phi; None: everything is body.

        Raises:
            ValueError: no parameter of the module belongs to `head`, or all of them do.
        """
        named = list(module.named_parameters())
        is_head = {name: head is not None and (name == head or name.startswith(f"{head}.")) for name, _ in named}
        if head is not None and not any(is_head.values()):
            raise ValueError(f"the model has no parameter in its head {head!r}: {[name for name, _ in named]}")
        body = [(name, p) for name, p in named if not is_head[name]]
        if not body:
            raise ValueError(f"the model has no body: every parameter is in the head {head!r}")
        self.layout = FlatLayout.of(chain(body, ((name, p) for name, p in named if is_head[name])))
        self.body_layout = FlatLayout.of(body)
        self.vector = torch.zeros(self.layout.numel, dtype=self.layout.dtype, device=body[0][1].device)
        self.grad = torch.zeros_like(self.vector)
        parameters = dict(named)
        for name, view in self.layout.views(self.vector).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        self._parameters = [parameters[slot.name] for slot in self.layout.slots]
        self._grads = list(self.layout.views(self.grad).values())

    @property
    def body(self) -> Tensor:
        """The first N elements of `vector`: the parameters that phi initializes."""
        return self.vector[: self.body_layout.numel]

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
