"""Recipes of the methods that train on pseudo-labels: DeepCluster, SeLa.

Sources: the papers; mmselfsup's ``configs/selfsup/deepcluster/``, since DeepCluster was published for AlexNet and VGG
alone; SeLa's ``main.py``, ``data.py``, ``scripts/resnet.sh`` and README.
"""

from collections.abc import Callable
from dataclasses import replace

from sslfast.methods import DeepCluster, SeLa
from sslfast.models import ResNetConfig
from sslfast.optim import OptimConfig
from sslfast.recipes.common import small, small_view
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, CropConfig, ViewConfig


def deepcluster() -> TrainConfig:
    """DeepCluster as mmselfsup runs it: ResNet-50 on Sobel derivatives, 10,000 clusters of 256 whitened components each
    epoch, 200 epochs.

    From mmselfsup's ``deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k.py`` and the files that it includes: Sobel
    input, jitter 0.4, 0.4, 1.0 and 0.5 turns, gray 0.2; batch 512, learning rate 0.1 throughout, weight decay 1e-5 on
    every parameter, no momentum in the classifier; PCA to 256, whitened, k-means before every epoch, whose samples are
    drawn uniformly over clusters. 20 iterations of k-means: the authors' ``clustering.py``.

    Departures: a sample that an epoch has several times has the same crop each time; the components are fitted on
    131,072 rows of bf16 features; features are of the whole central square, not of the central 224 px of 256; no
    rotation by up to 2 degrees.
    """
    return TrainConfig(
        recipe="deepcluster",
        method=DeepCluster.Config(
            feature_dtype="bf16",
            pca_sample=131_072,
            sampling="clusters",
            head_momentum=False,
            image_view=ViewConfig(augment=AugmentConfig(saturation=1.0, hue=0.5)),
        ),
        model=ResNetConfig(input="sobel"),
        optim=OptimConfig(
            lr_per_256_images=0.05, schedule="constant", weight_decay=1e-5, decay_norm=True, decay_bias=True
        ),
        epochs=200,
        batch_size=512,
    )


def sela() -> TrainConfig:
    """SeLa: ResNet-50, 10 heads of 3,000 clusters, λ = 25, 100 labellings over the run.

    From the authors' ``main.py``, ``data.py`` and ``scripts/resnet.sh``: 400 epochs of batch 256, learning rate 0.08,
    tenfold less after epochs 150, 300 and 350, weight decay 1e-5 on every parameter, the times of the labellings, which
    are of augmented images by their batch's statistics, jitter 0.4, gray 0.2.

    Departures: torchvision's ResNet-50, where the authors' number is of one with pre-activation, which
    ``--model.factory sslfast.models.preactivation:preactivation_resnet50`` takes; labellings at the start of epochs, of
    the crops that the epoch trains on; Sinkhorn stops at cluster masses within 1 %, the authors' at a sum of changes
    below 0.1; bf16 features (5.2 GB for ImageNet), theirs are float64; jitter, then grayscale.
    """
    return TrainConfig(
        recipe="sela",
        method=SeLa.Config(
            heads=10,
            clusters=3000,
            sharpness=25.0,
            labellings=100,
            feature_dtype="bf16",
            label_views="augmented",
            image_view=ViewConfig(augment=AugmentConfig(hue=0.4)),
        ),
        optim=OptimConfig(
            lr_per_256_images=0.08,
            schedule="steps",
            milestones=(150.0, 300.0, 350.0),
            weight_decay=1e-5,
            decay_norm=True,
            decay_bias=True,
        ),
        epochs=400,
        batch_size=256,
    )


def sela_aug() -> TrainConfig:
    """SeLa with MoCo v2's augmentation: torchvision's ResNet-50, 10 heads of 3,000 clusters, 280 epochs.

    From the authors' README ("Aug++ R50 10x3k"): trunk, heads, 280 epochs, MoCo v2's augmentation, three drops of the
    learning rate.

    Departures: the README leaves the epochs of the drops to a script of CMC that has had several; here 120, 160 and
    200. Everything else is that of ``sela``, with its departures but that of the trunk.
    """
    base = sela()
    augment = AugmentConfig(hue=0.1, jitter_probability=0.8, blur_probability=0.5, blur_sigma=(0.1, 2.0))
    view = ViewConfig(crop=CropConfig(size=224, scale=(0.2, 1.0)), augment=augment)
    return replace(
        base,
        recipe="sela-aug",
        method=replace(base.method, image_view=view),
        optim=replace(base.optim, milestones=(120.0, 160.0, 200.0)),
        epochs=280,
    )


def deepcluster_small() -> TrainConfig:
    """DeepCluster for images up to about 64 px: ResNet-18 with the small stem, 250 clusters, 64 whitened components,
    batch 256, 200 epochs. Clustered every 4 epochs: a new classifier needs some hundred steps, and epochs are short.
    """
    method = DeepCluster.Config(clusters=250, every_epochs=4, pca_dimensions=64, image_view=small_view())
    return small("deepcluster-small", method)


def sela_small() -> TrainConfig:
    """SeLa for images up to about 64 px: ResNet-18 with the small stem, 10 heads of 128 clusters, labelled every
    epoch, batch 256, 200 epochs."""
    return small("sela-small", SeLa.Config(heads=10, clusters=128, image_view=small_view()))


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "deepcluster": deepcluster,
    "deepcluster-small": deepcluster_small,
    "sela": sela,
    "sela-aug": sela_aug,
    "sela-small": sela_small,
}
