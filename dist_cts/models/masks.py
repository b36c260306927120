"""Seeded masks: dropout, stochastic depth and every other random draw of a forward pass, from (seed, task, step)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dist_cts.seeds import hashed_seed


class SeededMasks:
    """Seeds torch's generators for the forward pass of one step, and puts them back afterwards.

    A model draws its masks one after the other, so that each layer's follow from (seed, task, step, layer). They do not
    depend on what came before (a resumed or replayed step repeats them), nor on the other tasks of the rank. With D
    data ranks, each draws the masks of the full batch and uses its slice.
    """

    def __init__(self, device: torch.device, *seed: int | str, data_rank: int = 0, data_ranks: int = 1) -> None:
        """`seed`: of the run, and the task's name."""
        self.seed, self.data_rank, self.data_ranks = seed, data_rank, data_ranks
        self.generators = generators(device)

    @contextmanager
    def __call__(self, step: int, examples: int) -> Iterator[None]:
        """A block that holds the forward pass of global step `step` on this rank's `examples` of the batch, B / D."""
        states = [generator.get_state() for generator in self.generators]
        for generator in self.generators:
            generator.manual_seed(hashed_seed(*self.seed, "masks", step))
        share = nullcontext() if self.data_ranks == 1 else _Share(examples, self.data_rank, self.data_ranks)
        try:
            with share:
                yield
        finally:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)


def generators(device: torch.device) -> list[torch.Generator]:
    """The generators that a forward pass on the device draws from unless told otherwise."""
    gpu = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
    return [torch.default_generator, *gpu]


class _Share(TorchDispatchMode):
    """Random operations run on the full batch, and return this data rank's slice.

    Batch is a random tensor's first dimension if its length is a multiple of the examples, as in [B, ...] and in
    attention's [B x heads, ...]; other draws are the same on all ranks of the task.
    """

    def __init__(self, examples: int, data_rank: int, data_ranks: int) -> None:
        super().__init__()
        self.examples, self.data_rank, self.data_ranks = examples, data_rank, data_ranks

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags or _attends_without_dropout(function, args, kwargs):
            return function(*args, **kwargs)
        if "attention" in function.__name__:
            raise ValueError("its fused attention draws dropout masks that ranks of one task cannot share")
        whole = [self._whole(argument) for argument in args]
        if all(new is old for new, old in zip(whole, args, strict=True)):
            return function(*args, **kwargs)
        result = tree_map_only(Tensor, self._slice, function(*whole, **kwargs))
        return args[0].copy_(result) if function._schema.name.endswith("_") else result

    def _whole(self, argument: Any) -> Any:
        """A tensor [b, ...] inside a batch [D b, ...] of zeros, a shape [b, ...] as [D b, ...]; others unchanged."""
        if isinstance(argument, Tensor) and argument.ndim and len(argument) % self.examples == 0:
            shape = (self.data_ranks * len(argument), *argument.shape[1:])
            # The memory format decides in which order a generator fills a tensor.
            order = sorted(range(argument.ndim), key=lambda d: (-argument.stride(d), d))
            whole = argument.new_zeros([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])
            self._slice(whole).copy_(argument)
            return whole
        is_shape = isinstance(argument, list | tuple) and argument and all(isinstance(n, int) for n in argument)
        if is_shape and argument[0] % self.examples == 0:
            return [self.data_ranks * argument[0], *argument[1:]]
        return argument

    def _slice(self, tensor: Tensor) -> Tensor:
        length = len(tensor) // self.data_ranks
        return tensor.narrow(0, self.data_rank * length, length)


def _attends_without_dropout(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is an attention kernel with dropout probability zero, which draws nothing."""
    names = [argument.name for argument in function._schema.arguments]
    if "dropout_p" not in names:
        return False
    return not (dict(zip(names, args, strict=False)) | kwargs).get("dropout_p", 0.0)
