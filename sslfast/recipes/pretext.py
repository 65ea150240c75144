"""Recipes of the methods that classify a transform of the image: jigsaw, rotation, relative position.

Sources: VISSL's ``configs/config/pretrain/``: ``jigsaw/jigsaw_8gpu_resnet.yaml``, ``rotnet/rotnet_8gpu_resnet.yaml``;
mmselfsup's ``configs/selfsup/relative_loc/r50.py``; the papers. All of these divide the learning rate by 10 in steps.
"""

from collections.abc import Callable
from dataclasses import replace

from sslfast.methods import Jigsaw, MethodConfig, RelativePosition, Rotation, jigsaw_view
from sslfast.optim import OptimConfig
from sslfast.recipes.common import COLOURS, NO_COLOURS, small, small_view
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, ViewConfig


def _optim(lr: float, *, milestones: tuple[float, ...], warmup_epochs: float = 0.0) -> OptimConfig:
    return OptimConfig(
        lr_per_256_images=lr, schedule="steps", milestones=milestones, warmup_epochs=warmup_epochs, decay_bias=True
    )


def _gray_patches() -> ViewConfig:
    """Square crop of 60 to 100 % of the image, patches without flips, grayscale with probability 0.66.

    The area is chosen here: the sources resize the short side and crop a square, which keeps about as much. They
    convert the whole image to grayscale, here every patch by itself.
    """
    augment = AugmentConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.66)
    return jigsaw_view(255, 64, ratio=(1.0, 1.0), augment=augment)


def jigsaw() -> TrainConfig:
    """Jigsaw as VISSL runs it: ResNet-50, 2,000 permutations, 105 epochs, batch 256, learning rate 0.1, 5 epochs of
    warm-up, divided by 10 after epochs 30, 60, 90 and 100, patches of 64 in cells of 85, grayscale 0.66, weight decay
    1e-4 on biases too."""
    return TrainConfig(
        recipe="jigsaw",
        method=Jigsaw.Config(num_permutations=2000, jigsaw_view=_gray_patches()),
        optim=_optim(0.1, milestones=(30.0, 60.0, 90.0, 100.0), warmup_epochs=5.0),
        epochs=105,
        batch_size=256,
    )


def rotation() -> TrainConfig:
    """Rotation as VISSL runs it: ResNet-50, one drawn rotation of each image, crop 224 and flip, 105 epochs, batch
    256, learning rate 0.1, divided by 10 after epochs 30, 60, 90 and 100, weight decay 1e-4 on biases too.
    ``--method.all-turns`` is the paper's form."""
    return TrainConfig(
        recipe="rotation",
        method=Rotation.Config(image_view=ViewConfig(augment=replace(NO_COLOURS))),
        optim=_optim(0.1, milestones=(30.0, 60.0, 90.0, 100.0)),
        epochs=105,
        batch_size=256,
    )


def relative_position() -> TrainConfig:
    """Relative position: ResNet-50, patches of 64 in cells of 85, all eight pairs of each image, hidden layer of 4,096.

    From mmselfsup: 70 epochs, batch 512, learning rate 0.1 per 256 images, 5 epochs of warm-up, divided by 10 after
    epochs 30 and 50, grayscale 0.66, weight decay 1e-4 (it has 5e-4 on the head). From Doersch et al. section 3.1:
    colour dropping. All pairs: Kolesnikov et al. 2019.
    """
    return TrainConfig(
        recipe="relative-position",
        method=RelativePosition.Config(patch_view=_gray_patches()),
        optim=_optim(0.1, milestones=(30.0, 50.0), warmup_epochs=5.0),
        epochs=70,
        batch_size=512,
    )


def _small(recipe: str, method: MethodConfig) -> TrainConfig:
    """The small base with learning rate 0.1 per 256 images to 0; chosen here."""
    optim = OptimConfig(lr_per_256_images=0.1, final_lr_per_256_images=0.0, lr_update="step", weight_decay=5e-4)
    return replace(small(recipe, method), optim=optim)


def _small_patches() -> ViewConfig:
    """Patches of 16 in cells of 21, each jittered by itself: with so small a gap, brightness gives neighbours away."""
    return jigsaw_view(63, 16, ratio=(1.0, 1.0), augment=replace(COLOURS, flip_probability=0.0))


def jigsaw_small() -> TrainConfig:
    """Jigsaw for images up to about 64 px: ResNet-18 with the small stem, 100 permutations, batch 256, 200 epochs."""
    method = Jigsaw.Config(
        num_permutations=100, patch_features=256, image_view=small_view(NO_COLOURS), jigsaw_view=_small_patches()
    )
    return _small("jigsaw-small", method)


def rotation_small() -> TrainConfig:
    """Rotation for images up to about 64 px: ResNet-18 with the small stem, one drawn rotation, batch 256, 200
    epochs."""
    return _small("rotation-small", Rotation.Config(image_view=small_view(NO_COLOURS)))


def relative_position_small() -> TrainConfig:
    """Relative position for images up to about 64 px: ResNet-18 with the small stem, batch 256, 200 epochs.

    Colours of each patch are jittered instead of dropped: a trunk trained on one channel at a time has weak features of
    colour images.
    """
    method = RelativePosition.Config(
        hidden_features=512, drop_colours=False, image_view=small_view(NO_COLOURS), patch_view=_small_patches()
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
