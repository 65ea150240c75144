"""Batch normalisation over the samples of all ranks."""

import torch
from torch import Tensor, nn

from sslfast.distributed import gather_rows_with_gradient, world_size


class GlobalBatchNorm2d(nn.SyncBatchNorm):
    """BatchNorm whose mean and variance are those of the batches of all ranks together; plain BatchNorm in one process.

    On CUDA devices torch's SyncBatchNorm, which needs one; elsewhere each rank's mean and variance are gathered, and
    ``var = mean_r(var_r) + mean_r((mean_r - mean)²)``. Ranks hold batches of one size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1 or x.is_cuda:
            return super().forward(x)
        x = x.float()
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        means, variances = gather_rows_with_gradient(torch.stack((mean, variance))[None]).unbind(1)  # [ranks, C] each
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            count = x.numel() // x.shape[1] * world_size()
            weight = 0.1 if self.momentum is None else self.momentum
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(variance * (count / max(1, count - 1)), weight)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def globalise(module: nn.Module) -> None:
    """Turns every BatchNorm2d inside into a :class:`GlobalBatchNorm2d` with the same parameters and buffers."""
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = GlobalBatchNorm2d  # type: ignore[assignment]
            norm.process_group = None  # type: ignore[assignment]  # the group of all ranks
