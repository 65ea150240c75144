"""Parts of the methods that reconstruct an image: clean views, colour space, trunk and decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sslfast.methods.base import BaseConfig, Method, MethodContext
from sslfast.models import Decoder, build_trunk, seeded, trunk_stride
from sslfast.views import AugmentConfig, CropConfig, View, ViewConfig

IMAGE = "image"


def clean_view(size: int = 224) -> ViewConfig:
    """Crop and flip, no change of colour: the image itself is reconstructed."""
    augment = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0)
    return ViewConfig(crop=CropConfig(size=size, scale=(0.2, 1.0)), augment=augment)


class PixelSpace(nn.Module):
    """Network input to colours and back: ``pixels = (rgb - mean) / std``, float32 either way."""

    mean: Tensor
    std: Tensor

    def __init__(self, augment: AugmentConfig) -> None:
        super().__init__()
        for name, values in (("mean", augment.mean), ("std", augment.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def to_rgb(self, pixels: Tensor) -> Tensor:
        """``[..., 3, H, W]`` normalised to sRGB, clamped to 0..1."""
        return (pixels.float() * self.std + self.mean).clamp(0.0, 1.0)

    def from_rgb(self, rgb: Tensor) -> Tensor:
        """``[..., 3, H, W]`` sRGB in 0..1 to normalised."""
        return (rgb.float() - self.mean) / self.std


@dataclass(kw_only=True)
class ReconstructionConfig(BaseConfig):
    """Options of every method that reconstructs an image."""

    decoder_width: int = 512
    """Channels of the decoder's first map; halved with every doubling of the resolution, 32 at least."""
    image_view: ViewConfig = field(default_factory=clean_view)
    """The clean image: crop and flip only."""

    def validate(self) -> None:
        """Raises ValueError with the field, its value and what is allowed."""
        view = self.image_view
        if view.jigsaw is not None or view.rotation:
            raise ValueError(
                f"method.image_view must show the whole upright image, got jigsaw={view.jigsaw}, "
                f"rotation={view.rotation}; set neither"
            )
        for name in ("jitter_probability", "photometric_probability", "grayscale_probability"):
            value = getattr(view.augment, name)
            if value != 0:
                raise ValueError(
                    f"method.image_view.augment.{name} must be 0, since the image itself is the target, got {value}"
                )
        self.check_at_least(1, "decoder_width")


class Reconstruction(Method):
    """Trunk and decoder. Subclasses define the input of the trunk and the target of the decoder."""

    def __init__(
        self,
        config: ReconstructionConfig,
        context: MethodContext,
        *,
        out_channels: int = 3,
        out_stride: int = 1,
        code_channels: int | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        stride = trunk_stride(context.model, purpose=f"method {config.name}")
        self.seed = context.seed
        self.pixel_space = PixelSpace(config.image_view.augment)
        self.trunk = build_trunk(context.model, seed=context.seed)
        features = self.trunk.out_features
        with seeded(context.seed + 1):
            self.code = nn.Identity() if code_channels is None else nn.Conv2d(features, code_channels, kernel_size=1)
            self.decoder = Decoder(
                features if code_channels is None else code_channels,
                out_channels,
                in_stride=stride,
                out_stride=out_stride,
                width=config.decoder_width,
            )

    def predict(self, images: Tensor) -> Tensor:
        """The decoder's float32 output for the trunk's input ``[B, 3, H, W]``."""
        height, width = images.shape[-2:]
        res5 = self.trunk.stages(images)[-1]  # type: ignore[operator]
        output: Tensor = self.decoder(self.code(res5), (height, width))
        return output.float()


def clean_pixels(views: Mapping[str, View]) -> Tensor:
    """The clean image of a batch, float32 ``[B, 3, S, S]``."""
    return views[IMAGE].pixels.float()


def distance(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """``|p - t|`` for ``l1``, ``(p - t)²`` for ``l2``, elementwise."""
    difference = prediction - target
    return difference.abs() if kind == "l1" else difference.square()
