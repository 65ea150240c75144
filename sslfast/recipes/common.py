"""Bases that families of recipes share: the small trunk and schedule, and the view of small images."""

from dataclasses import replace
from typing import Literal

from sslfast.methods import MethodConfig
from sslfast.models import ResNetConfig
from sslfast.optim import OptimConfig
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, CropConfig, ViewConfig

COLOURS = AugmentConfig(hue=0.1, jitter_probability=0.8)
"""Augmentation of small images: jitter with probability 0.8, hue 0.1, no blur."""
NO_COLOURS = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0)
"""Flips only."""


def small(recipe: str, method: MethodConfig, *, norm: Literal["batch", "layer"] = "batch") -> TrainConfig:
    """For images up to about 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, SGD with the learning rate
    0.06 per 256 images and a cosine per step, weight decay 5e-4. Chosen here."""
    return TrainConfig(
        recipe=recipe,
        method=method,
        model=ResNetConfig(name="resnet18", stem="small", norm=norm),
        optim=OptimConfig(lr_per_256_images=0.06, final_lr_per_256_images=6e-5, lr_update="step", weight_decay=5e-4),
        epochs=200,
        batch_size=256,
        checkpoint_every_steps=500,
    )


def small_view(augment: AugmentConfig = COLOURS, *, size: int = 64) -> ViewConfig:
    """Whole small images: a crop of 20 to 100 % of the image."""
    return ViewConfig(crop=CropConfig(size=size, scale=(0.2, 1.0)), augment=replace(augment))
