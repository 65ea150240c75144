"""BatchNorm over the samples of all ranks on any device; torch's SyncBatchNorm supports CUDA only."""

import torch
from torch import Tensor, nn

from sslfast.distributed.collectives import gather_rows_with_gradient
from sslfast.distributed.process_group import world_size


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the mean and variance of the batches of all ranks together; plain BatchNorm in one process.

    Each rank's mean and variance are gathered: ``var = mean_r(var_r) + mean_r((mean_r - mean)²)``. All ranks must hold
    batches of the same size. On CUDA, torch's SyncBatchNorm is faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        pixels = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        variance, mean = torch.var_mean(pixels, dim=axes, correction=0)
        means, variances = gather_rows_with_gradient(torch.stack((mean, variance))[None]).unbind(1)  # [ranks, C] each
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            count = x.numel() // x.shape[1] * world_size()
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                weight = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(variance * (count / max(1, count - 1)), weight)
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return ((pixels - mean.view(shape)) * scale.view(shape)).to(x.dtype)
        scale = scale * self.weight
        return ((pixels - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm needs [B, C, ...], got {list(x.shape)}")


def globalize_batchnorm(module: nn.Module) -> None:
    """Turn every BatchNorm inside ``module`` into a :class:`GlobalBatchNorm` with the same parameters and buffers."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.__class__ = GlobalBatchNorm


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` whose BatchNorm layers normalise over the samples of all ranks; parameters and names stay.

    On CUDA torch's SyncBatchNorm, elsewhere :class:`GlobalBatchNorm`.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    globalize_batchnorm(module)
    return module
