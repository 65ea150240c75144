"""Recipes of the methods that reconstruct an image: autoencoder, colorization, super-resolution, inpainting.

None of the four was published with a ResNet-50 on ImageNet by its authors, so a recipe takes from its paper what does
not depend on another network (each docstring names the section), and the rest is chosen here: ResNet-50, 224 px crops
of 20 to 100 % of the image with flips, batch 256, 100 epochs, SGD with the learning rate 0.05 per 256 images, one epoch
of warm-up and a cosine.
"""

from collections.abc import Callable
from dataclasses import replace

from sslfast.methods import Autoencoder, Colorization, Inpainting, MethodConfig, SuperResolution, clean_view
from sslfast.optim import OptimConfig
from sslfast.recipes.common import small
from sslfast.training import TrainConfig


def _optim() -> OptimConfig:
    return OptimConfig(lr_per_256_images=0.05, final_lr_per_256_images=0.0, lr_update="step", warmup_epochs=1.0)


def _large(recipe: str, method: MethodConfig) -> TrainConfig:
    return TrainConfig(recipe=recipe, method=method, optim=_optim(), epochs=100, batch_size=256)


def _small(recipe: str, method: MethodConfig) -> TrainConfig:
    return replace(small(recipe, method), optim=_optim())


def autoencoder() -> TrainConfig:
    """Denoising autoencoder: ResNet-50, a quarter of the pixels destroyed, squared error.

    A quarter is one of the paper's shares of destroyed inputs (Vincent 2008, section 4). Chosen here: everything else.

    Departures: not the paper's network, data or optimisation; it has no number on ImageNet.
    """
    return _large("autoencoder", Autoencoder.Config())


def colorization() -> TrainConfig:
    """Colorization: ResNet-50, ab bins from lightness at a quarter of the resolution, rare colours weighted up.

    From Zhang 2016, sections 2.1 and 2.2: bins of 10, σ = 5, λ = 1/2, prediction at stride 4. From the authors'
    ``resources/caffe_traininglayers.py`` and ``models/colorization_train_val_v2.prototxt``: 10 neighbours, the colour
    of every fourth pixel, gray pictures left out of the loss. Chosen here: everything else.

    Departures: the authors train a VGG-like network, crops of 176 px, Adam with learning rate 3e-5, batch 40; bins are
    261, not 313, and their frequencies are counted during the run. No number is quoted: that of a ResNet-50 is Goyal et
    al.'s (2019), of whose optimisation nothing is published.
    """
    method = Colorization.Config(neighbours=10, cell_colour="first", mask_gray=True)
    return _large("colorization", method)


def super_resolution() -> TrainConfig:
    """Super-resolution by 4: ResNet-50, absolute error, no perceptual term. Chosen here: everything.

    Departures: there is no source with a number on ImageNet to depart from.
    """
    return _large("super-resolution", SuperResolution.Config())


def inpainting() -> TrainConfig:
    """Inpainting: ResNet-50, random regions over 20 to 30 % of the image, squared error over the whole image.

    From the authors' command for random regions (README and ``train_random.lua`` of pathak22/context-encoder): masks,
    the error's weight of 1 everywhere. Chosen here: everything else.

    Departures: no adversarial term (λ_adv 0.001 beside λ_rec 0.999); ResNet-50 on 224 px, where the authors train an
    AlexNet-like encoder on 128 px with Adam; a mask for each sample, where they have one for a batch.
    """
    return _large("inpainting", Inpainting.Config(holes="region", loss_over="image"))


def autoencoder_small() -> TrainConfig:
    """Denoising autoencoder for images up to about 64 px: ResNet-18 with the small stem, 16 code channels."""
    method = Autoencoder.Config(code_channels=16, decoder_width=128, image_view=clean_view(64))
    return _small("autoencoder-small", method)


def colorization_small() -> TrainConfig:
    """Colorization for images up to about 64 px: ResNet-18 with the small stem, cells of 4 px."""
    return _small("colorization-small", Colorization.Config(decoder_width=128, image_view=clean_view(64)))


def super_resolution_small() -> TrainConfig:
    """Super-resolution by 4 for images up to about 64 px: ResNet-18 with the small stem, absolute error."""
    return _small("super-resolution-small", SuperResolution.Config(decoder_width=128, image_view=clean_view(64)))


def inpainting_small() -> TrainConfig:
    """Inpainting for images up to about 64 px: ResNet-18 with the small stem, 5 random squares, a band of 2 px."""
    method = Inpainting.Config(overlap=2, decoder_width=128, image_view=clean_view(64))
    return _small("inpainting-small", method)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "autoencoder": autoencoder,
    "colorization": colorization,
    "super-resolution": super_resolution,
    "inpainting": inpainting,
    "autoencoder-small": autoencoder_small,
    "colorization-small": colorization_small,
    "super-resolution-small": super_resolution_small,
    "inpainting-small": inpainting_small,
}
