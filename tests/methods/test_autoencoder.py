import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.loaders.batch import AugmentConfig, CropConfig, JigsawConfig, View, ViewConfig
from sslfast.methods.autoencoder import Autoencoder, corrupt
from sslfast.methods.reconstruction import clean_view
from sslfast.models.decoder import Decoder, trunk_stride
from sslfast.models.resnet import ResNetConfig, build_trunk
from sslfast.recipes.generative import autoencoder, autoencoder_small
from tests.methods import harness

ROWS = torch.arange(40) * 7


def tiny(**changes: Any) -> Any:
    return harness.tiny(autoencoder_small(), **changes)


def pixels(count: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_perfect_and_constant_reconstruction(loss: str) -> None:
    method = harness.build(tiny(loss=loss))
    views, rows = harness.first_batch(tiny())
    clean = views["image"].pixels
    method.predict = lambda _seen: clean  # type: ignore[attr-defined]
    assert method(views, rows, step=0)["loss"] == 0
    mean = clean.mean()
    method.predict = lambda _seen: mean.expand_as(clean)  # type: ignore[attr-defined]
    spread = clean.var(correction=0) if loss == "l2" else (clean - mean).abs().mean()
    torch.testing.assert_close(method(views, rows, step=0)["loss"], spread)


def test_masking_destroys_whole_pixels_at_the_stated_rate() -> None:
    config = Autoencoder.Config(masked_share=0.25)
    clean = torch.ones(40, 3, 32, 32)
    seen = corrupt(clean, ROWS, config, seed=1, step=5)
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    destroyed = 1 - seen[:, 0]
    assert abs(destroyed.mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / destroyed.numel())
    assert (destroyed.mean(dim=0) - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / 40)  # no place is special


def test_gaussian_noise_is_normal() -> None:
    config = Autoencoder.Config(corruption="gaussian", noise_std=2.0)
    clean = torch.full((40, 3, 32, 32), 1.5)
    noise = (corrupt(clean, ROWS, config, seed=1, step=5) - clean) / 2
    bound = 4 / math.sqrt(noise.numel())
    assert abs(noise.mean().item()) < bound
    assert abs(noise.square().mean().item() - 1) < bound * math.sqrt(2)
    assert abs(noise.pow(4).mean().item() - 3) < bound * math.sqrt(96)
    assert abs((noise[..., 1:] * noise[..., :-1]).mean().item()) < bound * 1.1
    assert abs((noise[:, 0] * noise[:, 1]).mean().item()) < bound * 2


@pytest.mark.parametrize("corruption", ["masking", "gaussian"])
def test_corruption_is_a_function_of_seed_step_and_row(corruption: str) -> None:
    config = Autoencoder.Config(corruption=corruption)  # type: ignore[arg-type]
    clean, rows = pixels(4, 15), torch.tensor([3, 9, 9, 4])
    clean[2] = clean[1]
    seen = corrupt(clean, rows, config, seed=1, step=2)
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen.flip(0), corrupt(clean.flip(0), rows.flip(0), config, seed=1, step=torch.tensor(2)))
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert not torch.equal(seen, corrupt(clean, rows, config, **other))
    assert torch.equal(corrupt(clean, rows, replace(config, corruption="none"), seed=1, step=2), clean)


def test_destroyed_pixels_do_not_reach_the_network() -> None:
    config = tiny()
    method = harness.build(config)
    views, rows = harness.first_batch(config)
    clean = views["image"].pixels
    destroyed = corrupt(torch.ones_like(clean), rows, config.method, seed=config.seed, step=3) == 0
    other = torch.where(destroyed, 9.0, clean)
    seen = [corrupt(x, rows, config.method, seed=config.seed, step=3) for x in (clean, other)]
    assert torch.equal(*seen)
    losses = [method({"image": View(pixels=x)}, rows, step=3)["loss"] for x in (clean, other)]
    assert losses[0] != losses[1]  # they are asked for


def test_trains_and_resumes(tmp_path: Path) -> None:
    harness.assert_gradients_reach_the_trunk(tiny())
    harness.assert_overfits(tiny(), lr=0.1)
    harness.assert_resumes(tiny(), tmp_path, stops=(2,))


def test_panels_show_what_a_run_with_the_seed_sees() -> None:
    config = tiny(corruption="gaussian")
    views, rows = harness.first_batch(config)
    panels = config.method.preview_panels(views, rows, seed=config.seed)
    seen = corrupt(views["image"].pixels, rows, config.method, seed=config.seed, step=0)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.method.image_view.augment.mean,
                                                          config.method.image_view.augment.std))  # fmt: skip
    torch.testing.assert_close(panels["input"], (seen * std + mean).clamp(0, 1))
    torch.testing.assert_close(panels["target"], (views["image"].pixels * std + mean).clamp(0, 1))


@pytest.mark.parametrize("size", [32, 33, 47, 8])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_decoder_joins_every_size(size: int, stem: str) -> None:
    model = ResNetConfig(name="resnet18", stem=stem)  # type: ignore[arg-type]
    res5 = build_trunk(model, seed=0).eval().stages(torch.zeros(1, 3, size, size))[-1]
    for out_stride in (1, 4):
        decoder = Decoder(512, 5, in_stride=trunk_stride(model), out_stride=out_stride, width=16).eval()
        side = math.ceil(size / out_stride)
        assert decoder(res5, (size, size)).shape == (1, 5, side, side)


def test_decoder_widths_and_errors() -> None:
    decoder = Decoder(24, 3, in_stride=32, width=128)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [128, 64, 32, 32, 32, 32, 3]
    with pytest.raises(ValueError, match="in_stride must be a power of two, got 12"):
        Decoder(24, 3, in_stride=12)
    with pytest.raises(ValueError, match="out_stride must be at most in_stride=8, got 16"):
        Decoder(24, 3, in_stride=8, out_stride=16)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        Decoder(24, 3, in_stride=8, width=0)


JITTERED = ViewConfig(augment=AugmentConfig(grayscale_probability=0.0))
JIGSAW = ViewConfig(crop=CropConfig(size=255), jigsaw=JigsawConfig(), augment=clean_view().augment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked_share": 1.0}, r"method.masked_share must be in \(0, 1\), got 1.0"),
        ({"corruption": "gaussian", "noise_std": 0.0}, "method.noise_std must be positive and finite, got 0.0"),
        ({"code_channels": 0}, "method.code_channels must be at least 1, got 0"),
        ({"decoder_width": 0}, "method.decoder_width must be at least 1, got 0"),
        ({"image_view": JITTERED}, "jitter_probability must be 0, since the picture itself is the target, got 1.0"),
        ({"image_view": JIGSAW}, "method.image_view must show the whole upright picture"),
        ({"image_view": replace(clean_view(), rotation=True)}, "rotation=True; set neither"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder.Config(**changes).build(model=ResNetConfig(), num_rows=4, seed=0)


def test_recipes() -> None:
    large, small = autoencoder(), autoencoder_small()
    assert (large.model.name, large.method.image_view.crop.size) == ("resnet50", 224)
    assert (small.model.name, small.model.stem, small.method.image_view.crop.size) == ("resnet18", "small", 64)
    # The code has fewer numbers than the picture.
    for config, side in ((large, 224 // 32), (small, 64 // 8)):
        method = config.method
        assert isinstance(method, Autoencoder.Config)
        assert method.code_channels * side**2 < 3 * method.image_view.crop.size**2 / 10
