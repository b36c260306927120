"""Synchronized batch norm: D ranks with 1 / D of a batch each compute the same as one rank with the full batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverGroup(torch.autograd.Function):
    """All-reduce in forward and in backward, because every rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class GroupBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with batch statistics over a process group, computed in fp32 also under autocast.

    `nn.SyncBatchNorm` computes the same, but only on GPUs, and it synchronizes with the host in every layer.
    """

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * self.group.size()
        values = x.float()
        mean = _SumOverGroup.apply(values.sum((0, 2, 3)), self.group) / count
        centred = values - mean[:, None, None]
        variance = _SumOverGroup.apply((centred * centred).sum((0, 2, 3)), self.group) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def convert_sync_batch_norm(model: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """Synchronizes the model's batch norms over `group`, in place; None: unchanged."""
    if group is not None:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GroupBatchNorm
                module.group = group
    return model
