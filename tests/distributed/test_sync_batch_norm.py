"""Batch norms of every kind over a group of two ranks, against one rank with the full batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm

SHAPES = {"1d": (6, 4), "2d": (6, 4, 3, 3), "3d": (6, 4, 2, 2, 2), "sequence": (6, 4, 5), "act": (6, 4, 3, 3)}


def make(kind):
    torch.manual_seed(1)
    if kind == "act":
        from timm.layers import BatchNormAct2d

        return BatchNormAct2d(4)
    layer = {"2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}.get(kind, nn.BatchNorm1d)
    options = {"1d": {"momentum": None}, "3d": {"affine": False}, "sequence": {"track_running_stats": False}}
    return layer(4, **options.get(kind, {}))


def run(rank, kind):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[kind])
    layer = convert_sync_batch_norm(nn.Sequential(make(kind)), dist.group.WORLD) if rank is not None else make(kind)
    share = x if rank is None else x[3 * rank : 3 * rank + 3]
    share.requires_grad_(True)
    outputs = [layer(share) for _ in range(2)]
    (outputs[-1] ** 3).sum().backward()
    return (
        outputs[-1].detach(),
        share.grad,
        [buffer.clone() for buffer in layer.buffers()],
        layer.eval()(share).detach(),
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_two_halves_equal_the_whole(run_ranks, kind):
    if kind == "act":
        pytest.importorskip("timm")
    outputs, gradient, buffers, evaluated = run(None, kind)
    halves = run_ranks(2, run, kind)
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), outputs)
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), gradient, atol=1e-5, rtol=1e-4)
    for half in halves:
        for ours, expected in zip(half[2], buffers, strict=True):
            torch.testing.assert_close(ours, expected)
    if buffers:
        torch.testing.assert_close(torch.cat([half[3] for half in halves]), evaluated)


class Odd(nn.BatchNorm2d):
    """A batch norm with a forward pass of its own."""


def convert_odd(rank):
    try:
        convert_sync_batch_norm(nn.Sequential(Odd(4)), dist.group.WORLD)
    except ValueError as error:
        return str(error)


def test_a_batch_norm_of_another_kind_is_refused(run_ranks):
    assert run_ranks(1, convert_odd)[0] == (
        "Odd cannot be synchronized over the 1 ranks of a task; start at most one rank per task"
    )
