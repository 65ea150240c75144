"""Views: their configuration, random crop boxes, random view parameters, and the stage that renders uint8 crops into
network input. Imports ``sslfast.ops``."""

from sslfast.views.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from sslfast.views.crops import CentreCrop, crop_boxes, crop_draws
from sslfast.views.parameters import draw_view
from sslfast.views.stage import ViewStage
from sslfast.views.types import (
    MAX_VIEWS,
    Batch,
    CropConfig,
    JigsawConfig,
    View,
    ViewConfig,
    check_views,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_VIEWS",
    "AugmentConfig",
    "Batch",
    "CentreCrop",
    "CropConfig",
    "JigsawConfig",
    "View",
    "ViewConfig",
    "ViewStage",
    "check_views",
    "crop_boxes",
    "crop_draws",
    "draw_view",
]
