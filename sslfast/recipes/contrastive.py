"""Recipes of MoCo, SimCLR and CPC.

ImageNet numbers come from the papers: He et al., CVPR 2020 (MoCo v1: sections 3.3 and 4); Chen, Fan, Girshick & He,
arXiv 2003.04297 (v2); Chen et al., ICML 2020 (SimCLR: section 2, appendix A and B.9); van den Oord et al. 2018 (CPC:
section 3.3). What a paper leaves open is taken from its authors' public code or chosen here, and the docstring says so.
"""

from dataclasses import replace

from sslfast.methods import CPC, MoCo, SimCLR
from sslfast.models import ResNetConfig
from sslfast.optim import OptimConfig
from sslfast.recipes.common import small, small_view
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, CropConfig, ViewConfig


def moco_v1() -> TrainConfig:
    """MoCo v1: ResNet-50, 200 epochs, batch 256 (8 GPUs), 65,536 keys, τ 0.07, momentum 0.999, learning rate 0.03,
    divided by 10 after epochs 120 and 160.

    From the authors' code: crop scale, strengths of the jitter, decay of every parameter. Departure: jitter, then
    grayscale, as in v2; the authors' code for v1 (``main_moco.py`` without ``--aug-plus``) has grayscale first, so
    that the jitter of a gray picture changes its brightness and contrast alone.
    """
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=AugmentConfig(hue=0.4))
    return TrainConfig(
        recipe="moco-v1",
        method=MoCo.Config(image_view=view),
        optim=OptimConfig(
            lr_per_256_images=0.03,
            final_lr_per_256_images=0.0,
            schedule="steps",
            milestones=(120.0, 160.0),
            weight_decay=1e-4,
            decay_norm=True,
            decay_bias=True,
        ),
        epochs=200,
        batch_size=256,
    )


def moco_v2() -> TrainConfig:
    """MoCo v2: v1 with an MLP head, τ 0.2, blur and a cosine schedule; 200 epochs (67.5 %; 800 epochs: 71.1 %).

    From the authors' code (``main_moco.py --aug-plus``): the jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, before
    the grayscale, as here.
    """
    augment = AugmentConfig(hue=0.1, jitter_probability=0.8, blur_probability=0.5, blur_sigma=(0.1, 2.0))
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=augment)
    config = moco_v1()
    return replace(
        config,
        recipe="moco-v2",
        method=MoCo.Config(projection="mlp", temperature=0.2, image_view=view),
        optim=replace(config.optim, schedule="cosine", milestones=()),
    )


def simclr() -> TrainConfig:
    """SimCLR: ResNet-50, batch 4096, LARS with learning rate 4.8 (0.3 per 256), 10 epochs of warm-up, then a cosine,
    weight decay 1e-6, colour strength 1, blur, BatchNorm over all ranks; 1000 epochs (69.3 %; ablations: 100).

    Jitter, then grayscale, as the paper's appendix A has it.
    """
    augment = AugmentConfig(
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        jitter_probability=0.8,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
    )
    return TrainConfig(
        recipe="simclr",
        method=SimCLR.Config(image_view=ViewConfig(augment=augment)),
        optim=OptimConfig(
            name="lars",
            lr_per_256_images=0.3,
            final_lr_per_256_images=0.0,
            lr_update="step",
            warmup_epochs=10,
            weight_decay=1e-6,
        ),
        epochs=1000,
        batch_size=4096,
        sync_batchnorm=True,
    )


def cpc() -> TrainConfig:
    """CPC: 7 x 7 patches of 64 px with stride 32 from 256 px, flip and grayscale, batch 512 (16 on each of 32 GPUs).

    From the paper: Adam with learning rate 2e-4. Departures: ResNet-50 with layer normalisation (the paper:
    ResNet-v2-101 to its third stage, without BatchNorm), crops of half to three quarters of the image (256 px of 300),
    grayscale with probability 0.2, no jitter of patches. Open in the paper and chosen here: a constant learning rate
    after 5 epochs of warm-up, 200 epochs, steps 2 to 5.
    """
    return TrainConfig(
        recipe="cpc",
        method=CPC.Config(),
        model=ResNetConfig(norm="layer"),
        optim=OptimConfig(
            name="adamw",
            lr_per_256_images=1e-4,
            final_lr_per_256_images=0.0,
            schedule="constant",
            warmup_epochs=5,
            weight_decay=0.0,
        ),
        epochs=200,
        batch_size=512,
    )


def _moco_small_method() -> MoCo.Config:
    """Momentum 0.99, since a small data set has few steps per epoch."""
    return MoCo.Config(queue_size=4096, momentum=0.99, image_view=small_view())


def moco_v1_small() -> TrainConfig:
    """MoCo v1 for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, 4,096 keys."""
    return small("moco-v1-small", _moco_small_method())


def moco_v2_small() -> TrainConfig:
    """MoCo v2 for images up to 64 px: as ``moco-v1-small``, with MLP head and τ 0.2; no blur at this size."""
    method = replace(_moco_small_method(), projection="mlp", temperature=0.2)
    return small("moco-v2-small", method)


def simclr_small() -> TrainConfig:
    """SimCLR for images up to 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, SGD, τ 0.2; colour strength
    0.5 and no blur, as the paper has on CIFAR-10 (appendix B.9)."""
    method = SimCLR.Config(hidden_features=512, temperature=0.2, image_view=small_view())
    return small("simclr-small", method)


def cpc_small() -> TrainConfig:
    """CPC for images up to 64 px: ResNet-18 with the small stem and layer normalisation, 7 x 7 patches of 16 px with
    stride 8, batch 64 (49 patches an image), 200 epochs."""
    method = CPC.Config(patch_size=16, patch_stride=8, directions="all", image_view=small_view())
    config = small("cpc-small", method, norm="layer")
    return replace(
        config,
        optim=replace(config.optim, lr_per_256_images=0.12, warmup_epochs=5),
        batch_size=64,
    )


RECIPES = {
    "moco-v1": moco_v1,
    "moco-v2": moco_v2,
    "simclr": simclr,
    "cpc": cpc,
    "moco-v1-small": moco_v1_small,
    "moco-v2-small": moco_v2_small,
    "simclr-small": simclr_small,
    "cpc-small": cpc_small,
}
