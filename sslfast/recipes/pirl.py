"""Recipes of PIRL and NPID.

Numbers of the ImageNet recipes come from Misra & van der Maaten, CVPR 2020 (sections 3 and 4, appendix A) and from
VISSL's ``configs/config/pretrain/pirl/``, as each docstring says: optimisation from the paper's section 4 and
``pirl_jigsaw_4node_resnet50.yaml`` (batch 1024, SGD, learning rate 0.12 with a cosine to 1.2e-4, changed once an epoch,
weight decay 1e-4 without biases and BatchNorm), bank and loss from section 3.3 (128 columns, momentum 0.5, τ 0.07,
λ 0.5).
"""

from dataclasses import replace

from sslfast.methods import PIRL, jigsaw_view
from sslfast.models import ResNetConfig
from sslfast.optim import OptimConfig
from sslfast.recipes.common import COLOURS, small, small_view
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, CropConfig, ViewConfig


def paper_method() -> PIRL.Config:
    """PIRL with jigsaw, NCE, 32,000 negatives without the sample itself."""
    colour = AugmentConfig(hue=0.4, photometric_probability=0.66)
    return PIRL.Config(
        image_view=ViewConfig(augment=colour),
        jigsaw_view=jigsaw_view(augment=replace(colour, flip_probability=0.0)),
        rotation_view=ViewConfig(rotation=True, augment=colour),
    )


def pirl_paper() -> TrainConfig:
    """PIRL with jigsaw as published: ResNet-50, 800 epochs, batch 1024, NCE, 32,000 negatives without the
    sample itself.

    From the paper: crops, views, heads, bank and loss (section 3.3), optimisation (section 4). Open in the paper: the
    photometric gate and Z from the first batch, taken from VISSL; all four colour strengths 0.4, as NPID's code has
    them (VISSL: hue 0.2).

    Departures: neither the crop that is cut into patches nor a patch is mirrored, of which the paper says nothing
    (VISSL mirrors each patch, PyContrast the crop: ``method.crop_flip_probability=0.5``); only image views enter
    BatchNorm's running statistics.
    """
    return TrainConfig(recipe="pirl-paper", method=paper_method())


def pirl_vissl() -> TrainConfig:
    """PIRL with jigsaw as VISSL runs it.

    From VISSL's ``pirl_jigsaw_4node_resnet50.yaml`` and its loss: NCE with Z frozen from the first batch's patch
    scores, negatives drawn per view from all rows (including the sample's own), every augmentation on each patch, patch
    offsets 0 to 20, statistics of patches and images mixed.

    Departures: the bank is updated behind the optimizer's step, VISSL's inside of the forward pass.
    """
    colour = AugmentConfig(hue=0.2, photometric_probability=0.66)
    return TrainConfig(
        recipe="pirl-vissl",
        method=PIRL.Config(
            z_from="pretext",
            running_stats="mixed",
            exclude_self=False,
            separate_draws=True,
            image_view=ViewConfig(augment=colour),
            jigsaw_view=jigsaw_view(max_offset=20, augment=colour),
            rotation_view=ViewConfig(rotation=True, augment=colour),
        ),
    )


def pirl_mlp_blur() -> TrainConfig:
    """PIRL with MLP heads, InfoNCE and SimCLR's augmentation, as VISSL runs it: the best PIRL that is published.

    From VISSL's ``models/resnet50_mlphead.yaml``: heads 2048 - 2048 - 128, of patches with a ReLU behind the second
    layer, then 1152 - 128; softmax over 32,000 negatives, τ 0.1. From ``transforms/photo_gblur.yaml``: flip, jitter
    0.8, 0.8, 0.8 and 0.2 turns with probability 0.8, gray 0.2, blur 0.5, of the image and of each patch. Everything
    else: ``pirl-vissl``; 200 epochs are VISSL's shorter run.

    Departures: those of ``pirl-vissl``; the blur is exact, where PIL's is three box blurs.
    """
    colour = AugmentConfig(
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        jitter_probability=0.8,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
    )
    base = pirl_vissl()
    assert isinstance(base.method, PIRL.Config)
    method = replace(
        base.method,
        projection="mlp",
        temperature=0.1,
        loss="infonce",
        image_view=ViewConfig(augment=colour),
        jigsaw_view=jigsaw_view(max_offset=20, augment=colour),
        rotation_view=ViewConfig(rotation=True, augment=colour),
    )
    return replace(base, recipe="pirl-mlp-blur", method=method)


def pirl_rotation() -> TrainConfig:
    """The paper's ablation with rotation (table 5): 400 epochs, 4,096 negatives.

    From the paper: appendix A.2 (one linear head), table 5. Everything else: ``pirl-paper``.

    Departures: only image views enter BatchNorm's running statistics.
    """
    method = replace(paper_method(), pretext="rotation", num_negatives=4096)
    return TrainConfig(recipe="pirl-rotation", method=method, epochs=400)


def pirl_rotation_jigsaw() -> TrainConfig:
    """The paper's ablation with rotation, then jigsaw (table 5): 400 epochs, 4,096 negatives.

    From the paper: appendix A.2, table 5. Everything else: ``pirl-paper``.

    Departures: those of ``pirl-paper``.
    """
    method = replace(paper_method(), pretext="rotation+jigsaw", num_negatives=4096)
    return TrainConfig(recipe="pirl-rotation-jigsaw", method=method, epochs=400)


def npid() -> TrainConfig:
    """NPID of Wu, Xiong, Yu & Lin, CVPR 2018 (sections 3.2 and 3.3): ResNet-50, 200 epochs, batch 256, learning
    rate 0.03, NCE, 4,096 negatives uniform over all rows (including the sample's own), τ 0.07.

    The learning rate is divided by 10 after epochs 120 and 160. From the authors' code (lemniscate's ``main.py``): crop
    scale, colour strengths, decay of every parameter, bank momentum 0.5, Z from the first batch.

    Departures: no proximal term; jitter, then grayscale, where the authors' code has grayscale first.
    """
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=AugmentConfig(hue=0.4))
    return TrainConfig(
        recipe="npid",
        method=PIRL.Config(pretext_weight=0.0, num_negatives=4096, exclude_self=False, image_view=view),
        optim=OptimConfig(
            lr_per_256_images=0.03,
            schedule="steps",
            milestones=(120.0, 160.0),
            weight_decay=1e-4,
            decay_norm=True,
            decay_bias=True,
        ),
        epochs=200,
        batch_size=256,
    )


def npid_plus_plus() -> TrainConfig:
    """NPID++ of the PIRL paper: instance discrimination with 32,000 negatives, 800 epochs.

    From VISSL's ``npid/npid++_4nodes_resnet.yaml``: jitter 0.4 of all four kinds and flips, neither grayscale nor
    photometric operations, batch 1024, the optimisation of PIRL with decay of biases too, negatives over all rows.

    Departures: the paper's number is of the authors' own run, which has no published configuration; VISSL's run of this
    one reaches less. The jitter is behind the crop, VISSL's before it. The bank is updated behind the optimizer's step.
    """
    image = ViewConfig(augment=AugmentConfig(hue=0.4, grayscale_probability=0.0))
    return TrainConfig(
        recipe="npid-plus-plus",
        method=PIRL.Config(pretext_weight=0.0, exclude_self=False, image_view=image),
        optim=OptimConfig(decay_bias=True),
    )


def small_method() -> PIRL.Config:
    """PIRL for images of about 64 px: 64 px crops, 3 x 3 cells of 21 px with 16 px patches, InfoNCE."""
    return PIRL.Config(
        num_negatives=4096,
        loss="infonce",
        image_view=small_view(),
        jigsaw_view=jigsaw_view(63, 16, augment=replace(COLOURS, flip_probability=0.0)),
        rotation_view=replace(small_view(), rotation=True),
    )


def pirl_small() -> TrainConfig:
    """PIRL for images up to about 64 px: ResNet-18 with the small stem, batch 256, 200 epochs, InfoNCE.

    InfoNCE departs from the paper's NCE, whose Z from one batch does not suit a few thousand rows.
    """
    return small("pirl-small", small_method())


def npid_small() -> TrainConfig:
    """NPID for images up to about 64 px: ``pirl-small`` with λ = 0."""
    return small("npid-small", replace(small_method(), pretext_weight=0.0))


def demo() -> TrainConfig:
    """PIRL in minutes on two CPU cores, for the crops of ``sslfast demo``: ResNet-18 with the ImageNet stem on 48 px,
    batch 32 (on so small a data set more steps matter more than large batches), InfoNCE with temperature 0.1."""
    image = small_view(size=48)
    return TrainConfig(
        recipe="demo",
        method=PIRL.Config(
            num_negatives=1024,
            loss="infonce",
            temperature=0.1,
            image_view=image,
            jigsaw_view=jigsaw_view(48, 14, augment=replace(COLOURS, flip_probability=0.0)),
            rotation_view=replace(image, rotation=True),
        ),
        model=ResNetConfig(name="resnet18", stem="imagenet"),
        optim=OptimConfig(lr_per_256_images=0.36, final_lr_per_256_images=0.0, lr_update="step", weight_decay=5e-4),
        epochs=40,
        batch_size=32,
        log_every_steps=16,
        checkpoint_every_steps=160,
    )


RECIPES = {
    "pirl-paper": pirl_paper,
    "pirl-vissl": pirl_vissl,
    "pirl-mlp-blur": pirl_mlp_blur,
    "pirl-rotation": pirl_rotation,
    "pirl-rotation-jigsaw": pirl_rotation_jigsaw,
    "npid": npid,
    "npid-plus-plus": npid_plus_plus,
    "pirl-small": pirl_small,
    "npid-small": npid_small,
    "demo": demo,
}
