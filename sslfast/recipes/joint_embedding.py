"""Recipes of the joint-embedding methods without negatives: BYOL, SimSiam, Barlow Twins, VICReg, SwAV, DINO.

ImageNet numbers come from the authors' public code, read file by file: google-deepmind/deepmind-research ``byol/``
(``configs/byol.py``, ``utils/augmentations.py``, ``networks.py``, ``optimizers.py``, ``schedules.py``),
facebookresearch/simsiam ``main_simsiam.py`` and ``simsiam/builder.py``, facebookresearch/barlowtwins ``main.py``,
facebookresearch/vicreg ``main_vicreg.py`` and ``augmentations.py``, facebookresearch/swav ``main_swav.py`` and
``scripts/``, facebookresearch/dino ``main_dino.py``, ``utils.py`` and ``vision_transformer.py``.

Departures common to all: pictures are resized as every loader here does it, where BYOL, Barlow Twins, VICReg and DINO
have bicubic interpolation; the Gaussian blur is exact, where PIL's is three box blurs; initial weights of linear layers
are torch's; the rate of a warm-up's step differs from theirs by at most the rise of one step, since no step has rate 0.
Of those with LARS: the rate is inside of the momentum, where these codes have it outside, and decay enters the trust
ratio by its norm (see ``optim/lars.py``), as in SwAV's code, where the others take the norm of gradient and decay
together.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sslfast.methods import BYOL, DINO, BarlowTwins, MethodConfig, SimSiam, SwAV, VICReg
from sslfast.models import ResNetConfig
from sslfast.optim import OptimConfig
from sslfast.recipes.common import COLOURS, small, small_view
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, CropConfig, ViewConfig


def _byol_views(**crop: Any) -> tuple[ViewConfig, ViewConfig]:
    """The two views of BYOL, which Barlow Twins, VICReg and DINO share: every first one is blurred, a tenth of the
    second ones, of which a fifth is solarized."""
    augment = AugmentConfig(
        saturation=0.2, hue=0.1, jitter_probability=0.8, blur_probability=1.0, blur_sigma=(0.1, 2.0)
    )
    second = replace(augment, blur_probability=0.1, solarize_probability=0.2)
    return tuple(ViewConfig(crop=CropConfig(**crop), augment=views) for views in (augment, second))  # type: ignore[return-value]


def _lars(lr: float, weight_decay: float, *, final: float = 0.0, **options: Any) -> OptimConfig:
    """10 epochs of warm-up, then a cosine to ``final`` of the peak, changed at every step."""
    return OptimConfig(
        name="lars",
        lr_per_256_images=lr,
        final_lr_per_256_images=final * lr,
        lr_update="step",
        warmup_epochs=10,
        weight_decay=weight_decay,
        **options,
    )


def byol() -> TrainConfig:
    """BYOL: ResNet-50, batch 4096, LARS with learning rate 3.2 (0.2 per 256), 10 epochs of warm-up, then a cosine,
    weight decay 1.5e-6, momentum 0.996 rising to 1, BatchNorm over all ranks; 1000 epochs.

    From the authors' code: everything, with the presets of 1000 epochs; 300 epochs take rate 0.3, weight decay 1e-6 and
    momentum 0.99. Residual scales start at 1, as the README says of the paper's runs.

    Departures: those of this module; the target starts equal to the online network, where the code draws it anew ("did
    not notice a significant difference"); initial weights of convolutions are torchvision's. Jitter and crop are
    torchvision's: the code adds to the brightness, where here is a factor, takes the contrast around the mean of each
    channel, here around that of the gray picture, scales the saturation of HSV, here blends with the gray picture, and
    cuts a crop that is too large to the image, where here up to ten are drawn.
    """
    first, second = _byol_views()
    return TrainConfig(
        recipe="byol",
        method=BYOL.Config(output_bias=False, image_view=first, second_view=second),
        optim=_lars(0.2, 1.5e-6),
        epochs=1000,
        batch_size=4096,
        sync_batchnorm=True,
    )


def simsiam() -> TrainConfig:
    """SimSiam: ResNet-50, batch 512, SGD with learning rate 0.1 (0.05 per 256) and a cosine, constant for the
    predictor, weight decay 1e-4, BatchNorm over all ranks; 100 epochs.

    From the authors' code: everything, as its README's command ``--fix-pred-lr`` runs it; the decay is of every
    parameter, the rate changes once an epoch, views are MoCo v2's.

    Departures: those of this module but warm-up and LARS.
    """
    augment = AugmentConfig(hue=0.1, jitter_probability=0.8, blur_probability=0.5, blur_sigma=(0.1, 2.0))
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=augment)
    return TrainConfig(
        recipe="simsiam",
        method=SimSiam.Config(image_view=view, second_view=replace(view)),
        model=ResNetConfig(zero_init_residual=True),
        optim=OptimConfig(
            lr_per_256_images=0.05,
            final_lr_per_256_images=0.0,
            weight_decay=1e-4,
            decay_norm=True,
            decay_bias=True,
        ),
        epochs=100,
        batch_size=512,
        sync_batchnorm=True,
    )


def barlow_twins() -> TrainConfig:
    """Barlow Twins: ResNet-50, batch 2048, 8,192 dimensions, λ 0.0051, LARS with learning rate 1.6 (0.2 per 256), 10
    epochs of warm-up, then a cosine to a thousandth, BatchNorm over all ranks; 1000 epochs.

    From the authors' code: everything. Its gradient is that of the whole batch divided by the number of processes, 16
    in the README's run (see ``methods/barlow_twins.py``). To take the same steps with the gradient itself, the rate of
    biases and normalisation layers is a 16th of theirs, 0.0048 per 256, and the weight decay, which LARS weighs against
    the gradient, 16 times their 1e-6.

    Departures: those of this module.
    """
    first, second = _byol_views()
    return TrainConfig(
        recipe="barlow-twins",
        method=BarlowTwins.Config(image_view=first, second_view=second),
        model=ResNetConfig(zero_init_residual=True),
        optim=_lars(0.2, 16e-6, final=1e-3, bias_norm_lr_factor=0.0048 / 0.2 / 16),
        epochs=1000,
        batch_size=2048,
        sync_batchnorm=True,
    )


def vicreg() -> TrainConfig:
    """VICReg: ResNet-50, batch 2048, 8,192 dimensions, weights 25, 25 and 1, LARS with learning rate 1.6 (0.2 per 256),
    10 epochs of warm-up, then a cosine to a thousandth, weight decay 1e-6, BatchNorm over all ranks; 1000 epochs.

    From the authors' code: everything, as its README's command for 1000 epochs runs it; its command for 100 epochs has
    batch 512 and 0.3 per 256.

    Departures: those of this module.
    """
    first, second = _byol_views()
    return TrainConfig(
        recipe="vicreg",
        method=VICReg.Config(image_view=first, second_view=second),
        model=ResNetConfig(zero_init_residual=True),
        optim=_lars(0.2, 1e-6, final=1e-3),
        epochs=1000,
        batch_size=2048,
        sync_batchnorm=True,
    )


def swav() -> TrainConfig:
    """SwAV: ResNet-50, crops 2 x 224 and 6 x 96, batch 4096, 3,000 prototypes, LARS on every parameter with learning
    rate 4.8 (0.3 per 256), 10 epochs of warm-up from 0.3, then a cosine to 0.0048, weight decay 1e-6, BatchNorm over
    all ranks; 800 epochs.

    From the authors' code: everything, as ``scripts/swav_800ep_pretrain.sh`` runs it, with the 0.228 of its
    normalisation; those of 400, 200 and 100 epochs differ in ``--epochs`` alone.

    Departures: those of this module; BatchNorm is over all ranks, in the script over groups of 8. For batch 256 the
    script ``swav_200ep_bs256_pretrain.sh`` has ``--epochs 200 --batch-size 256 --optim.lr-per-256-images 0.6
    --optim.final-lr-per-256-images 0.0006 --optim.warmup-epochs 0 --method.queue-size 3840
    --method.frozen-steps 5005``.
    """
    augment = AugmentConfig(
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        jitter_probability=0.8,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
        std=(0.228, 0.224, 0.225),
    )
    large = ViewConfig(crop=CropConfig(size=224, scale=(0.14, 1.0)), augment=augment)
    local = ViewConfig(crop=CropConfig(size=96, scale=(0.05, 0.14)), augment=replace(augment))
    return TrainConfig(
        recipe="swav",
        method=SwAV.Config(image_view=large, second_view=replace(large), local_view=local, local_crops=6),
        optim=_lars(0.3, 1e-6, final=1e-3, warmup_factor=0.3 / 4.8, decay_norm=True, decay_bias=True),
        epochs=800,
        batch_size=4096,
        sync_batchnorm=True,
    )


def dino() -> TrainConfig:
    """DINO: ResNet-50, crops 2 x 224 and 8 x 96, batch 512, 65,536 outputs, SGD with learning rate 0.06 (0.03 per 256),
    10 epochs of warm-up, then a cosine to 1e-6, weight decay 1e-4, gradients of each parameter clipped at 3, momentum
    0.996 rising to 1, BatchNorm over all ranks; 100 epochs.

    From the authors' code: everything, as its README's command for ResNet-50 on 8 GPUs runs it, for which it publishes
    logs but no accuracy. The number of the README and the paper is of 800 epochs with batch 4080 and LARS, whose other
    arguments are not in the repository.

    Departures: those of this module but LARS.
    """
    first, second = _byol_views(size=224, scale=(0.14, 1.0))
    local = ViewConfig(
        crop=CropConfig(size=96, scale=(0.05, 0.14)), augment=replace(first.augment, blur_probability=0.5)
    )
    return TrainConfig(
        recipe="dino",
        method=DINO.Config(image_view=first, second_view=second, local_view=local, local_crops=8),
        optim=OptimConfig(
            lr_per_256_images=0.03,
            final_lr_per_256_images=5e-7,
            lr_update="step",
            warmup_epochs=10,
            weight_decay=1e-4,
            clip_grad_norm=3.0,
            clip_each=True,
        ),
        epochs=100,
        batch_size=512,
        sync_batchnorm=True,
    )


def byol_small() -> TrainConfig:
    """BYOL for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, SGD, momentum 0.99 rising to
    1, no blur."""
    method = BYOL.Config(
        hidden_features=512, dimensions=128, momentum=0.99, image_view=small_view(), second_view=small_view()
    )
    return small("byol-small", method)


def simsiam_small() -> TrainConfig:
    """SimSiam for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, SGD, 512 dimensions, no
    blur."""
    method = SimSiam.Config(
        hidden_features=512,
        dimensions=512,
        predictor_features=128,
        image_view=small_view(),
        second_view=small_view(),
    )
    return small("simsiam-small", method)


def _small_lars(recipe: str, method: MethodConfig) -> TrainConfig:
    """The small base with LARS: learning rate 0.3 per 256 images, trust coefficient 0.01, 10 epochs of warm-up, weight
    decay 1e-4; chosen here, since the size of these losses depends on the number of dimensions."""
    return replace(small(recipe, method), optim=_lars(0.3, 1e-4, final=1e-3, trust_coefficient=0.01))


def barlow_twins_small() -> TrainConfig:
    """Barlow Twins for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, LARS, 1,024
    dimensions, no blur."""
    method = BarlowTwins.Config(
        hidden_features=1024, dimensions=1024, image_view=small_view(), second_view=small_view()
    )
    config = _small_lars("barlow-twins-small", method)
    return replace(config, optim=replace(config.optim, bias_norm_lr_factor=0.0048 / 0.2))


def vicreg_small() -> TrainConfig:
    """VICReg for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, LARS, 1,024 dimensions, no
    blur."""
    method = VICReg.Config(hidden_features=1024, dimensions=1024, image_view=small_view(), second_view=small_view())
    return _small_lars("vicreg-small", method)


def _small_crops() -> dict[str, Any]:
    """Two crops of 64 px and four of 32."""
    return {
        "image_view": small_view(),
        "second_view": small_view(),
        "local_view": ViewConfig(crop=CropConfig(size=32, scale=(0.05, 0.2)), augment=replace(COLOURS)),
        "local_crops": 4,
    }


def swav_small() -> TrainConfig:
    """SwAV for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, SGD, crops 2 x 64 and 4 x 32,
    128 prototypes, no blur, no queue."""
    return small("swav-small", SwAV.Config(hidden_features=512, prototypes=128, **_small_crops()))


def dino_small() -> TrainConfig:
    """DINO for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, SGD, crops 2 x 64 and 4 x 32,
    1,024 outputs, momentum 0.99 rising to 1, gradients of each parameter clipped at 3, no blur."""
    method = DINO.Config(hidden_features=512, bottleneck_features=128, dimensions=1024, momentum=0.99, **_small_crops())
    config = small("dino-small", method)
    return replace(config, optim=replace(config.optim, warmup_epochs=10, clip_grad_norm=3.0, clip_each=True))


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "byol": byol,
    "simsiam": simsiam,
    "barlow-twins": barlow_twins,
    "vicreg": vicreg,
    "swav": swav,
    "dino": dino,
    "byol-small": byol_small,
    "simsiam-small": simsiam_small,
    "barlow-twins-small": barlow_twins_small,
    "vicreg-small": vicreg_small,
    "swav-small": swav_small,
    "dino-small": dino_small,
}
