"""Recipes of the methods that classify a transform of the image: jigsaw, rotation, relative position.

Sources: VISSL's ``configs/config/pretrain/``: ``jigsaw/jigsaw_8gpu_resnet.yaml``, ``rotnet/rotnet_8gpu_resnet.yaml``;
mmselfsup's ``configs/selfsup/relative_loc/``; the papers. All of these divide the learning rate by 10 in steps.
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


def _patches(*, max_offset: int | None = None) -> ViewConfig:
    """Square crop of 60 to 100 % of the image, patches of 64 in cells of 85, no augmentation of a patch by itself."""
    augment = AugmentConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.0)
    return jigsaw_view(255, 64, max_offset=max_offset, ratio=(1.0, 1.0), augment=augment)


def jigsaw() -> TrainConfig:
    """Jigsaw as VISSL runs it: ResNet-50, 2,000 permutations, 105 epochs, patches of 64 in cells of 85.

    From VISSL's ``jigsaw/jigsaw_8gpu_resnet.yaml``: the crop mirrored with probability 0.5 and gray with 0.66 before it
    is cut, offsets 0 to 20, heads 2048 - 1000 with BatchNorm and 9000 - 2000; batch 256, learning rate 0.1, 5 epochs of
    warm-up from a quarter, divided by 10 after epochs 30, 60, 90 and 100; weight decay 1e-4, on biases too.

    Departures: crops of 60 to 100 % of the image, where VISSL resizes the shorter side to 256 and takes a square of
    255, which keeps about as much; permutations chosen by the seed in place of the published file, which
    ``--method.permutation-file`` reads.
    """
    return TrainConfig(
        recipe="jigsaw",
        method=Jigsaw.Config(
            num_permutations=2000,
            crop_flip_probability=0.5,
            crop_grayscale_probability=0.66,
            jigsaw_view=_patches(max_offset=20),
        ),
        optim=replace(_optim(0.1, milestones=(30.0, 60.0, 90.0, 100.0), warmup_epochs=5.0), warmup_factor=0.25),
        epochs=105,
        batch_size=256,
    )


def rotation() -> TrainConfig:
    """Rotation as VISSL runs it: ResNet-50, one drawn rotation of each image, 105 epochs.

    From VISSL's ``rotnet/rotnet_8gpu_resnet.yaml``: crop 224 and flip, a linear head, batch 256, learning rate 0.1,
    divided by 10 after epochs 30, 60, 90 and 100, weight decay 1e-4, on biases too. ``--method.all-turns`` is the form
    of Gidaris et al. 2018.

    Departures: the crop is mirrored before it is turned, as in the authors' RotNet; VISSL turns the image, then crops
    and mirrors it, so that in half of its pictures 90 and 270 degrees are exchanged.
    """
    return TrainConfig(
        recipe="rotation",
        method=Rotation.Config(image_view=ViewConfig(augment=replace(NO_COLOURS))),
        optim=_optim(0.1, milestones=(30.0, 60.0, 90.0, 100.0)),
        epochs=105,
        batch_size=256,
    )


def relative_position() -> TrainConfig:
    """Relative position as mmselfsup runs it: ResNet-50, all eight pairs of each image, 70 epochs.

    From mmselfsup's ``relative_loc/relative-loc_resnet50_8xb64-steplr-70e_in1k.py`` and the files that it includes: the
    crop gray with probability 0.66 before it is cut, patches of 64 in cells of 85, colours kept; head 4096 - 4096 with
    BatchNorm, ReLU and dropout 0.5, then 8 classes; batch 512, learning rate 0.2, 5 epochs of warm-up from a tenth,
    divided by 10 after epochs 30 and 50; weight decay 1e-4 on every parameter, 5e-4 in the head.

    Departures: crops of 60 to 100 % of the image, where mmselfsup resizes to 292 and takes a square of 255; PyTorch's
    initial weights of the head; ImageNet's mean and deviation, which mmselfsup rounds to whole levels of 255.
    """
    return TrainConfig(
        recipe="relative-position",
        method=RelativePosition.Config(
            drop_colours=False,
            dropout=0.5,
            head_weight_decay=5e-4,
            crop_grayscale_probability=0.66,
            patch_view=_patches(),
        ),
        optim=replace(
            _optim(0.1, milestones=(30.0, 50.0), warmup_epochs=5.0),
            warmup_factor=0.1,
            lr_update="step",
            decay_norm=True,
        ),
        epochs=70,
        batch_size=512,
    )


def relative_position_doersch() -> TrainConfig:
    """Relative position with the patches of Doersch et al.: 96 px, 48 px apart, one channel kept, standardised.

    From the authors' ``deepcontext/train.py``: patch, gap, 7 px of jitter to every side, a third of the patches made
    small and enlarged again, one channel kept and centred, each patch scaled by its root mean square; and from section
    3.1 of the paper the noise in the dropped channels, 1/100 of the kept one's deviation.

    Departures: ResNet-50 and one hidden layer in the head, where the authors train an AlexNet-like network with two;
    crops of 41 to 100 % of the image, where they resize it to 150,000 to 450,000 pixels and lay grids over all of it;
    the centre with its neighbours, where they take all adjacent pairs both ways; optimisation as ``relative-position``
    with batch 256, where they have a constant rate of 1e-5 and no weight decay.
    """
    augment = AugmentConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.0)
    view = jigsaw_view(432, 96, max_offset=14, ratio=(1.0, 1.0), augment=augment)
    view = replace(view, crop=replace(view.crop, scale=(0.41, 1.0)))
    base = relative_position()
    method = RelativePosition.Config(standardise=True, downsample_probability=1 / 3, patch_view=view)
    return replace(base, recipe="relative-position-doersch", method=method, batch_size=256)


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
    "relative-position-doersch": relative_position_doersch,
    "relative-position-small": relative_position_small,
}
