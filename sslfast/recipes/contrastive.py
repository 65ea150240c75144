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

    From the paper: sections 3.3 and 4. From the authors' code (``main_moco.py``): crop scale, strengths of the jitter,
    decay of every parameter; BatchNorm over 32 samples, those of one of their 8 GPUs, whatever the number of processes.

    Departures: jitter, then grayscale, as in v2; ``main_moco.py`` without ``--aug-plus`` has grayscale first, so that
    the jitter of a gray picture changes its brightness and contrast alone. In one process the running statistics are
    updated once for every 32 samples.
    """
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=AugmentConfig(hue=0.4))
    return TrainConfig(
        recipe="moco-v1",
        method=MoCo.Config(batchnorm_samples=32, image_view=view),
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
    """MoCo v2: v1 with an MLP head, τ 0.2, blur and a cosine schedule; 200 epochs.

    From the authors' code (``main_moco.py --mlp --moco-t 0.2 --aug-plus --cos``): the jitter (0.4, 0.4, 0.4, 0.1) with
    probability 0.8, before the grayscale, as here; everything else as v1.

    Departures: the blur is exact, where PIL's is three box blurs. In one process the running statistics are updated
    once for every 32 samples.
    """
    augment = AugmentConfig(hue=0.1, jitter_probability=0.8, blur_probability=0.5, blur_sigma=(0.1, 2.0))
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=augment)
    config = moco_v1()
    method = MoCo.Config(projection="mlp", temperature=0.2, batchnorm_samples=32, image_view=view)
    return replace(
        config,
        recipe="moco-v2",
        method=method,
        optim=replace(config.optim, schedule="cosine", milestones=()),
    )


def simclr() -> TrainConfig:
    """SimCLR as its authors run it: ResNet-50, batch 4096, LARS with learning rate 4.8 (0.3 per 256), 10 epochs of
    warm-up, then a cosine, weight decay 1e-6, BatchNorm over all ranks; 1000 epochs.

    From the paper: section 2 and appendix A (colour strength 1, blur, jitter, then grayscale). From the authors' code
    (google-research/simclr ``model_util.py``, ``resnet.py``): BatchNorm behind both layers of the head, the last scale
    of each residual block starts at 0, no decay of BatchNorm and biases.

    Departures: initial weights are torchvision's, those of the head torch's; pictures are resized as every loader here
    does it, and crops drawn by torchvision's rule. Contrast is changed around the mean of the gray picture, saturation
    by a blend with it, where TensorFlow takes each channel's mean and scales HSV's. A warm-up's step has the rate that
    the authors have one step later; decay enters the trust ratio by its norm, where they take that of gradient and
    decay together.
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
        method=SimCLR.Config(head_norm=True, image_view=ViewConfig(augment=augment)),
        model=ResNetConfig(zero_init_residual=True),
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


def simclr_vissl() -> TrainConfig:
    """SimCLR as VISSL runs it: head without BatchNorm, LARS and decay on every parameter, 1000 epochs.

    From VISSL's ``simclr/simclr_8node_resnet.yaml``: everything; the warm-up begins at 0.6. ``--epochs`` 200 and 800
    are further runs of its model zoo, with the same 10 epochs of warm-up.

    Departures: BatchNorm over all ranks, VISSL's over the 8 of a node; LARS has the rate inside of the momentum, LARC
    outside; the blur is exact, where PIL's is three box blurs.
    """
    base = simclr()
    assert isinstance(base.method, SimCLR.Config)
    return replace(
        base,
        recipe="simclr-vissl",
        method=replace(base.method, head_norm=False),
        model=ResNetConfig(),
        optim=replace(base.optim, warmup_factor=0.125, decay_norm=True, decay_bias=True),
    )


def cpc() -> TrainConfig:
    """CPC: 7 x 7 patches of 64 px with stride 32 from 256 px, flip and grayscale, batch 512 (16 on each of 32 GPUs).

    From the paper, section 3.3: patches, Adam with learning rate 2e-4. Open in the paper and chosen here: a constant
    learning rate after 5 epochs of warm-up, 200 epochs, steps 2 to 5.

    Departures: ResNet-50 with layer normalisation (the paper: ResNet-v2-101 to its third stage, without BatchNorm),
    crops of half to three quarters of the image (256 px of 300), grayscale with probability 0.2, no jitter of patches.
    Evaluations give the trunk whole images unless asked for patches; the paper's features are those of patches,
    averaged. So the paper's number is not of this recipe, and none is quoted.
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
    "simclr-vissl": simclr_vissl,
    "cpc": cpc,
    "moco-v1-small": moco_v1_small,
    "moco-v2-small": moco_v2_small,
    "simclr-small": simclr_small,
    "cpc-small": cpc_small,
}
