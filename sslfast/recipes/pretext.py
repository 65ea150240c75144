"""Recipes of the methods that ask what was done to a picture: jigsaw, rotation, relative position.

Sources: VISSL's ``configs/config/pretrain/``: ``jigsaw/jigsaw_8gpu_resnet.yaml``, ``rotnet/rotnet_8gpu_resnet.yaml``;
mmselfsup's ``configs/selfsup/relative_loc/r50.py``; the papers. All of these drop the rate tenfold in steps.
"""

from collections.abc import Callable
from dataclasses import replace

from sslfast.methods import Jigsaw, MethodConfig, RelativePosition, Rotation
from sslfast.optim import OptimConfig
from sslfast.recipes.pirl import pirl_small
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, CropConfig, JigsawConfig, ViewConfig

_PLAIN = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0)
"""Flips alone."""


def _optim(lr: float, *, milestones: tuple[float, ...], warmup_epochs: float = 0.0) -> OptimConfig:
    return OptimConfig(
        lr_per_256_images=lr, schedule="steps", milestones=milestones, warmup_epochs=warmup_epochs, decay_bias=True
    )


def _gray_patches(*, size: int, patch_size: int) -> ViewConfig:
    """Square crop of 60 to 100 % of the picture, patches without flips, gray with probability 0.66.

    The share is chosen here: the sources resize the short side and crop a square, which keeps about as much. They turn
    the whole picture gray, here every patch by itself.
    """
    return ViewConfig(
        crop=CropConfig(size=size, scale=(0.6, 1.0), ratio=(1.0, 1.0)),
        jigsaw=JigsawConfig(grid=3, patch_size=patch_size),
        augment=AugmentConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.66),
    )


def jigsaw() -> TrainConfig:
    """Jigsaw as VISSL runs it: ResNet-50, 2,000 permutations, 105 epochs, batch 256, learning rate 0.1, 5 epochs of
    warm-up and tenfold less after epochs 30, 60, 90 and 100, patches of 64 in cells of 85, gray 0.66, weight decay 1e-4
    on biases too."""
    return TrainConfig(
        recipe="jigsaw",
        method=Jigsaw.Config(num_permutations=2000, jigsaw_view=_gray_patches(size=255, patch_size=64)),
        optim=_optim(0.1, milestones=(30.0, 60.0, 90.0, 100.0), warmup_epochs=5.0),
        epochs=105,
        batch_size=256,
    )


def rotation() -> TrainConfig:
    """Rotation as VISSL runs it: ResNet-50, one drawn turn of each image, crop 224 and flip, 105 epochs, batch 256,
    learning rate 0.1, tenfold less after epochs 30, 60, 90 and 100, weight decay 1e-4 on biases too.
    ``--method.all-turns`` is the paper's form."""
    return TrainConfig(
        recipe="rotation",
        method=Rotation.Config(image_view=ViewConfig(augment=_PLAIN)),
        optim=_optim(0.1, milestones=(30.0, 60.0, 90.0, 100.0)),
        epochs=105,
        batch_size=256,
    )


def relative_position() -> TrainConfig:
    """Relative position: ResNet-50, patches of 64 in cells of 85, all eight pairs of each image, hidden layer of 4,096.

    From mmselfsup: 70 epochs, batch 512, learning rate 0.1 per 256 images, 5 epochs of warm-up, tenfold less after
    epochs 30 and 50, gray 0.66, weight decay 1e-4 (it has 5e-4 on the head). From Doersch et al. section 3.1: colour
    dropping. All pairs: Kolesnikov et al. 2019.
    """
    return TrainConfig(
        recipe="relative-position",
        method=RelativePosition.Config(patch_view=_gray_patches(size=255, patch_size=64)),
        optim=_optim(0.1, milestones=(30.0, 50.0), warmup_epochs=5.0),
        epochs=70,
        batch_size=512,
    )


def _small(recipe: str, method: MethodConfig) -> TrainConfig:
    """ResNet-18 with the small stem, batch 256, 200 epochs; all chosen here."""
    optim = OptimConfig(lr_per_256_images=0.1, final_lr_per_256_images=0.0, lr_update="step", weight_decay=5e-4)
    return replace(pirl_small(), recipe=recipe, method=method, optim=optim)


def _small_image() -> ViewConfig:
    return ViewConfig(crop=CropConfig(size=64, scale=(0.2, 1.0)), augment=_PLAIN)


def _small_patches() -> ViewConfig:
    """Patches of 16 in cells of 21, the colours of each by itself: so small a gap shows how bright a neighbour is."""
    return ViewConfig(
        crop=CropConfig(size=63, scale=(0.6, 1.0), ratio=(1.0, 1.0)),
        jigsaw=JigsawConfig(grid=3, patch_size=16),
        augment=AugmentConfig(flip_probability=0.0, hue=0.1, jitter_probability=0.8),
    )


def jigsaw_small() -> TrainConfig:
    """Jigsaw for images up to about 64 px: ResNet-18 with the small stem, 100 permutations, batch 256, 200 epochs."""
    method = Jigsaw.Config(
        num_permutations=100, patch_features=256, image_view=_small_image(), jigsaw_view=_small_patches()
    )
    return _small("jigsaw-small", method)


def rotation_small() -> TrainConfig:
    """Rotation for images up to about 64 px: ResNet-18 with the small stem, one drawn turn, batch 256, 200 epochs."""
    return _small("rotation-small", Rotation.Config(image_view=_small_image()))


def relative_position_small() -> TrainConfig:
    """Relative position for images up to about 64 px: ResNet-18 with the small stem, batch 256, 200 epochs.

    Patches have their colours jittered one by one instead of dropped: shown next to whole colour pictures, a trunk that
    knows one channel at a time has little to say.
    """
    method = RelativePosition.Config(
        hidden_features=512, drop_colours=False, image_view=_small_image(), patch_view=_small_patches()
    )
    return _small("relative-position-small", method)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "jigsaw": jigsaw,
    "jigsaw-small": jigsaw_small,
    "rotation": rotation,
    "rotation-small": rotation_small,
    "relative-position": relative_position,
    "relative-position-small": relative_position_small,
}
