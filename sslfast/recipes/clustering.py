"""Recipes of the methods that train on pseudo-labels: DeepCluster, SeLa.

Sources: the papers; mmselfsup's ``configs/selfsup/deepcluster/r50_withoutsobel.py``, since DeepCluster was published
for AlexNet and VGG alone; SeLa's ``main.py`` and ``scripts/resnet.sh``.
"""

from collections.abc import Callable

from sslfast.methods import DeepCluster, SeLa
from sslfast.optim import OptimConfig
from sslfast.recipes.common import small, small_view
from sslfast.training import TrainConfig
from sslfast.views import AugmentConfig, ViewConfig


def deepcluster() -> TrainConfig:
    """DeepCluster: ResNet-50, 10,000 clusters of 256 whitened components each epoch, 200 epochs.

    From Caron et al. section 3.3: batch 256, learning rate 0.05 throughout, weight decay 1e-5. From mmselfsup: 200
    epochs, jitter 0.4, 0.4, 1.0 and 0.5 turns, gray 0.2, in place of the paper's Sobel filter.
    """
    return TrainConfig(
        recipe="deepcluster",
        method=DeepCluster.Config(image_view=ViewConfig(augment=AugmentConfig(saturation=1.0, hue=0.5))),
        optim=OptimConfig(
            lr_per_256_images=0.05, schedule="constant", weight_decay=1e-5, decay_norm=True, decay_bias=True
        ),
        epochs=200,
        batch_size=256,
    )


def sela() -> TrainConfig:
    """SeLa: ResNet-50, 10 heads of 3,000 clusters, λ = 25, 100 labellings over the run.

    From the authors' ``main.py`` and ``scripts/resnet.sh``: 400 epochs of batch 256, learning rate 0.08, tenfold less
    after epochs 150, 300 and 350, weight decay 1e-5, the times of the labellings, rounded to whole epochs, jitter 0.4,
    gray 0.2.
    Chosen here: bf16 features (5.2 GB for ImageNet).
    """
    return TrainConfig(
        recipe="sela",
        method=SeLa.Config(
            heads=10,
            clusters=3000,
            sharpness=25.0,
            labellings=100,
            feature_dtype="bf16",
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
    "sela-small": sela_small,
}
