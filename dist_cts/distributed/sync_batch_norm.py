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


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm [B, C, ...] with statistics over a process group, computed in fp32 also under autocast.

    `nn.SyncBatchNorm` computes the same, but only on GPUs, and it synchronizes with the host in every layer.
    """

    group: dist.ProcessGroup

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * self.group.size()
        over = [dimension for dimension in range(x.ndim) if dimension != 1]
        values, channels = x.float(), (-1, *[1] * (x.ndim - 2))  # the shape that broadcasts [C] over x
        mean = _SumOverGroup.apply(values.sum(over), self.group) / count
        centred = values - mean.view(channels)
        variance = _SumOverGroup.apply((centred * centred).sum(over), self.group) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale.view(channels)).to(x.dtype)
        return (centred * (self.weight * scale).view(channels) + self.bias.view(channels)).to(x.dtype)


class GroupBatchNormAct(GroupBatchNorm):
    """The same in timm's layer that applies dropout and activation as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def convert_sync_batch_norm(model: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """Synchronizes the model's batch norms over `group`, in place; None: unchanged.

    Raises:
        ValueError: a batch norm of another kind, which D ranks with 1 / D of a batch each would compute otherwise.
    """
    if group is not None:
        for module in model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if type(module).__module__ == nn.BatchNorm2d.__module__:
                module.__class__ = GroupBatchNorm
            elif type(module).__name__ == "BatchNormAct2d":
                module.__class__ = GroupBatchNormAct
            else:
                raise ValueError(
                    f"{type(module).__name__} cannot be synchronized over the {group.size()} ranks of a task; start at "
                    "most one rank per task"
                )
            module.group = group
    return model
