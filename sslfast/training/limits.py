"""What a configuration must fulfil before anything is read or allocated: the range of every number, a loss with a
gradient."""

from typing import TYPE_CHECKING

from torch import nn

from sslfast.methods import BatchSplit
from sslfast.models import LibraryTrunk, ResNetConfig, ResNetTrunk, check_sizes, trunk_stride

if TYPE_CHECKING:
    from sslfast.training.config import TrainConfig

_COUNT = 10**9  # of steps: no run reaches it
_FEATURES = (1, 1 << 16)
_PIXELS = (1, 1 << 13)

LIMITS: dict[str, tuple[float, float]] = {
    "epochs": (1, 10**6),
    "batch_size": (1, 1 << 20),
    "accumulate_steps": (1, 1 << 20),
    "seed": (0, 2**63 - 1),
    "nonfinite_limit": (1, _COUNT),
    "log_every_steps": (1, _COUNT),
    "knn_every_epochs": (0, _COUNT),
    "probe_every_epochs": (0, _COUNT),
    "pictures_every_epochs": (0, _COUNT),
    "checkpoint_every_steps": (1, _COUNT),
    "keep_checkpoints": (1, _COUNT),
    "keep_every_steps": (0, _COUNT),
    "rank_timeout": (0.1, 10**6),
    "loader.workers": (0, 1024),
    "loader.white_level": (255, 65535),
    "loader.max_pixels": (1, 1 << 32),
    "loader.mixed_shards": (1, 10**6),
    "loader.timeout": (0.1, 10**6),
    "optim.trust_coefficient": (0, 1000),
    "optim.lr_per_256_images": (0, 10**6),
    "optim.final_lr_per_256_images": (0, 10**6),
    "optim.milestones": (0, 10**9),
    "optim.gamma": (0, 1),
    "optim.warmup_epochs": (0, 10**6),
    "optim.warmup_factor": (0, 1),
    "optim.bias_norm_lr_factor": (0, 1000),
    "optim.momentum": (0, 1),
    "optim.betas": (0, 1),
    "optim.weight_decay": (0, 1000),
    "optim.final_weight_decay": (0, 1000),
    "optim.clip_grad_norm": (0, 10**6),
    "model.width": (0.125, 16),
    "crop.size": (8, 1 << 13),
    "crop.scale": (1e-4, 1),
    "crop.ratio": (1e-2, 1e2),
    "jigsaw.grid": (1, 16),
    "jigsaw.patch_size": (4, 1 << 13),
    "jigsaw.max_offset": (0, 1 << 13),
    "augment.flip_probability": (0, 1),
    "augment.jitter_probability": (0, 1),
    "augment.photometric_probability": (0, 1),
    "augment.grayscale_probability": (0, 1),
    "augment.blur_probability": (0, 1),
    "augment.solarize_probability": (0, 1),
    "augment.solarize_threshold": (0, 256),
    "augment.brightness": (0, 10),
    "augment.contrast": (0, 10),
    "augment.saturation": (0, 10),
    "augment.hue": (0, 0.5),
    "augment.blur_sigma": (1e-3, 100),
    "augment.mean": (-100, 100),
    "augment.std": (1e-4, 100),
    "method.dimensions": _FEATURES,
    "method.hidden_features": _FEATURES,
    "method.patch_features": _FEATURES,
    "method.context_features": _FEATURES,
    "method.feature_columns": (0, 1 << 16),
    "method.pca_sample": (0, _COUNT),
    "method.pca_dimensions": (0, 1 << 16),
    "method.code_channels": _FEATURES,
    "method.decoder_width": _FEATURES,
    "method.context_blocks": (1, 64),
    "method.temperature": (1e-3, 100),
    "method.momentum": (0, 1),
    "method.bank_momentum": (0, 1),
    "method.z_momentum": (0, 1),
    "method.pretext_weight": (0, 1),
    "method.num_negatives": (1, 1 << 24),
    "method.queue_size": (0, 1 << 26),
    "method.predictor_features": _FEATURES,
    "method.bottleneck_features": _FEATURES,
    "method.layers": (1, 64),
    "method.off_diagonal_weight": (0, 10**6),
    "method.invariance_weight": (0, 10**6),
    "method.variance_weight": (0, 10**6),
    "method.covariance_weight": (0, 10**6),
    "method.local_crops": (0, 13),
    "method.prototypes": (2, 10**7),
    "method.epsilon": (1e-3, 100),
    "method.queue_start_epoch": (0, 10**6),
    "method.frozen_steps": (0, _COUNT),
    "method.frozen_epochs": (0, 10**6),
    "method.teacher_temperature": (1e-3, 100),
    "method.warmup_teacher_temperature": (1e-3, 100),
    "method.teacher_warmup_epochs": (0, 10**6),
    "method.center_momentum": (0, 1),
    "method.num_permutations": (2, 10_000),
    "method.clusters": (2, 10**7),
    "method.heads": (1, 1000),
    "method.every_epochs": (1, _COUNT),
    "method.iterations": (1, 10_000),
    "method.max_iterations": (1, 10**6),
    "method.labellings": (0, 10**6),
    "method.labelling_epochs": (0, 10**6),
    "method.sharpness": (1e-3, 10**4),
    "method.tolerance": (1e-12, 1),
    "method.patch_size": _PIXELS,
    "method.patch_stride": _PIXELS,
    "method.first_step": (1, 1 << 13),
    "method.last_step": (1, 1 << 13),
    "method.stride": _PIXELS,
    "method.factor": (2, 1 << 13),
    "method.overlap": (0, 1 << 13),
    "method.overlap_weight": (0, 10**6),
    "method.blocks": (1, 10_000),
    "method.masked_share": (0, 1),
    "method.neighbours": (1, 1000),
    "method.batchnorm_samples": (0, 1 << 20),
    "method.crop_flip_probability": (0, 1),
    "method.crop_grayscale_probability": (0, 1),
    "method.downsample_probability": (0, 1),
    "method.dropout": (0, 0.99),
    "method.head_weight_decay": (0, 1000),
    "method.uniform_share": (0, 1),
    "method.noise_std": (0, 100),
    "method.perceptual_weight": (0, 10**6),
}
"""Smallest and largest value of every number in a :class:`~sslfast.training.TrainConfig`, by the last parts of its
dotted name. Wide: what lies outside has no use, and would overflow or take for ever. Some classes check more
closely."""

_MAX_STEPS = 2**32  # random draws are functions of the step modulo 2**32


def check_start(config: "TrainConfig", split: BatchSplit, *, rows: int, steps_per_epoch: int) -> None:
    """Check a run of ``config`` on ``rows`` images before it is built.

    Raises:
        ValueError: names the value and the remedy.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"batch_size={config.batch_size} is more than the {rows} images there are; lower it")
    parts = split.ranks * config.accumulate_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of processes x accumulate_steps = "
            f"{split.ranks} x {config.accumulate_steps} = {parts}"
        )
    if config.epochs * steps_per_epoch >= _MAX_STEPS:
        raise ValueError(
            f"epochs={config.epochs} of {steps_per_epoch:,} steps are more than {_MAX_STEPS - 1:,} steps; "
            "lower epochs or raise batch_size"
        )
    config.method.check_batch(split)


def check_trunk(trunk: nn.Module, config: "TrainConfig", split: BatchSplit) -> None:
    """Check that BatchNorm in res5 has values enough, and that a network of a library takes the sizes that it sees. A
    method may have another trunk than ``config.model``: of that one nothing is known.

    Raises:
        ValueError: names the value and the remedy.
    """
    if isinstance(trunk, LibraryTrunk):
        check_sizes(trunk, config.method.trunk_sizes())
    if not isinstance(trunk, ResNetTrunk) or not isinstance(config.model, ResNetConfig) or config.model.norm != "batch":
        return
    stride = trunk_stride(config.model)
    for name, view in config.method.views().items():
        size = view.crop.size if view.jigsaw is None else view.jigsaw.patch_size
        cells = (1 if view.jigsaw is None else view.jigsaw.grid**2) * (-(-size // stride)) ** 2
        remedy = ", or set model.norm to layer" + (" or model.stem to small" if stride > 8 else "")
        split.check_normalised(f"res5 on the view {name!r} of {size} px", per_sample=cells, remedy=remedy)
