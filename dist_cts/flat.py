"""One contiguous vector behind a module's parameters, so that a meta-step costs the same for 6 tensors or 600."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: unaligned views cost a CPU convolution several per cent


@dataclass(frozen=True)
class Slot:
    """Where one named tensor lies in a flat vector; `stride` keeps its memory format."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements


@dataclass(frozen=True)
class FlatLayout:
    """The slots of a flat vector, in order, and its length N with the alignment's gaps.

    Ranks whose layouts differ would average unrelated weights, and gloo would not notice: `lines` is what they compare.
    """

    slots: tuple[Slot, ...]
    numel: int
    dtype: torch.dtype

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> "FlatLayout":
        """The layout of named tensors, each start aligned to 64 bytes.

        Raises:
            ValueError: no tensor, or tensors of more than one dtype.
        """
        named = list(named)
        dtypes = {tensor.dtype for _, tensor in named}
        if len(dtypes) != 1:
            raise ValueError(f"a flat vector needs tensors of one dtype, got {sorted(map(str, dtypes))}")
        dtype = dtypes.pop()
        step = max(1, ALIGNMENT // dtype.itemsize)
        slots, offset = [], 0
        for name, tensor in named:
            # A dense tensor keeps its strides (channels_last too); anything else becomes contiguous.
            stride = torch.empty_like(tensor, memory_format=torch.preserve_format).stride()
            slots.append(Slot(name, tuple(tensor.shape), tuple(stride), offset))
            offset += -(-tensor.numel() // step) * step
        return cls(tuple(slots), offset, dtype)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The named tensors inside `vector` [N]; they share its memory."""
        start = vector.storage_offset()
        return {slot.name: vector.as_strided(slot.shape, slot.stride, start + slot.offset) for slot in self.slots}

    def lines(self) -> list[str]:
        """One line a tensor: name, shape, stride, dtype."""
        return [f"{s.name} {list(s.shape)} stride {list(s.stride)} {self.dtype}" for s in self.slots]

    def fingerprint(self) -> str:
        """A short hash of `lines`, equal on two ranks exactly when their vectors can be averaged."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]


class FlatParams:
    """A module's parameters as views of one vector, the body first and the head behind it.

    `vector` [N + H] and `grad` [N + H] hold every parameter and its gradient; `body` [N] is the part that phi shares.
    The module's own parameters become views, so forward and backward read and write the flat memory directly.
    """

    def __init__(self, module: nn.Module, head: str | None) -> None:
        """`head` names the submodule (or parameter prefix) that is not part of phi; None: all is body.

        Raises:
            ValueError: the module has no parameter called `head`, or nothing but the head.
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
        grads = self.layout.views(self.grad)
        parameters = dict(named)
        for name, view in self.layout.views(self.vector).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
            parameters[name].grad = grads[name]

    @property
    def body(self) -> Tensor:
        """The first N elements of `vector`: the parameters that phi initializes."""
        return self.vector[: self.body_layout.numel]


def load_named(layout: FlatLayout, vector: Tensor, named: Mapping[str, Tensor], source: str = "the start") -> None:
    """Copies named tensors, which `source` gave, into `vector` [N]; tensors of other names are ignored.

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
