import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslfast.methods.autoencoder import Autoencoder, corrupt
from sslfast.methods.shared.reconstruction import clean_view
from sslfast.models.build import build_trunk, trunk_stride
from sslfast.models.decoder import Decoder
from sslfast.models.init import seeded
from sslfast.models.resnet import ResNetConfig
from sslfast.ops.philox import Stream, random_uint32
from sslfast.recipes.generative import autoencoder, autoencoder_small
from sslfast.views.types import AugmentConfig, CropConfig, JigsawConfig, View, ViewConfig
from tests.methods import harness
from tests.tiny import context

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
    assert (destroyed.mean(dim=0) - 0.25).abs().max() < 6 * math.sqrt(0.25 * 0.75 / 40)  # uniform over positions


@pytest.mark.parametrize(("share", "below"), [(1 / 256, 1), (0.2, 51), (0.25, 64), (0.3, 77)])
def test_a_pixel_is_destroyed_where_its_byte_is_below_the_share_of_256(share: float, below: int) -> None:
    config = Autoencoder.Config(masked_share=share)
    seen = corrupt(torch.ones(40, 3, 15, 15), ROWS, config, seed=1, step=5)
    words = random_uint32(ROWS, 57, seed=1, stream=Stream.CORRUPTION, step=5)
    octets = torch.from_numpy(words.numpy().astype("<u4").view("u1")[:, : 15 * 15])
    assert torch.equal(seen[:, 0].flatten(1) == 0, octets < below)


def test_normal_numbers_are_the_box_muller_transform_of_the_halves_of_a_word() -> None:
    config = Autoencoder.Config(corruption="gaussian", noise_std=0.5)
    noise = corrupt(torch.zeros(40, 3, 8, 8), ROWS, config, seed=1, step=5) / 0.5
    words = random_uint32(ROWS, 96, seed=1, stream=Stream.CORRUPTION, step=5)
    pairs = torch.view_as_complex(noise.view(40, 96, 2))
    uniform = ((words >> 16).double() + 0.5) / 2**16
    torch.testing.assert_close(pairs.abs().double().square(), -2 * uniform.log(), rtol=1e-4, atol=1e-6)
    turns = (pairs.angle() / (2 * math.pi)).remainder(1)
    difference = (turns - (words & 0xFFFF) / 2**16 + 0.5).remainder(1) - 0.5
    assert difference.abs().max() < 1e-5


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
def test_corruption_is_a_function_of_seed_step_and_sample_id(corruption: str) -> None:
    config = Autoencoder.Config(corruption=corruption)  # type: ignore[arg-type]
    clean, rows = pixels(4, 15), torch.tensor([3, 9, 9, 4])
    clean[2] = clean[1]
    seen = corrupt(clean, rows, config, seed=1, step=2)
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen.flip(0), corrupt(clean.flip(0), rows.flip(0), config, seed=1, step=torch.tensor(2)))
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert not torch.equal(seen, corrupt(clean, rows, config, **other))
    assert torch.equal(corrupt(clean, rows, replace(config, corruption="none"), seed=1, step=2), clean)


@pytest.mark.parametrize("corruption", ["none", "masking", "gaussian"])
def test_the_network_sees_the_corrupted_image_of_the_seed_and_step(corruption: str) -> None:
    config = replace(tiny(corruption=corruption), seed=5)
    method = harness.build(config)
    views, rows = harness.first_batch(config)
    seen: list[Tensor] = []
    method.trunk.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    method(views, rows, step=3)
    assert torch.equal(seen[0], corrupt(views["image"].pixels, rows, config.method, seed=5, step=3))


def test_code_and_decoder_are_drawn_from_seed_plus_one() -> None:
    config = replace(tiny(code_channels=6, decoder_width=40), seed=5)
    method = harness.build(config)
    with seeded(6):
        expected = nn.ModuleDict({"code": nn.Conv2d(24, 6, 1), "decoder": Decoder(6, 3, in_stride=8, width=40)})
    for name, value in expected.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name


def test_predictions_are_float32_images_of_any_shape() -> None:
    method = harness.build(tiny())
    assert method.predict(torch.zeros(2, 3, 24, 40)).shape == (2, 3, 24, 40)  # type: ignore[operator]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert method.predict(torch.zeros(2, 3, 32, 32)).dtype == torch.float32  # type: ignore[operator]


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
    assert losses[0] != losses[1]  # they are reconstructed


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
def test_decoder_output_has_the_size_of_the_image(size: int, stem: str) -> None:
    model = ResNetConfig(name="resnet18", stem=stem)  # type: ignore[arg-type]
    res5 = build_trunk(model, seed=0).eval().stages(torch.zeros(1, 3, size, size))[-1]
    for out_stride in (1, 4):
        decoder = Decoder(512, 5, in_stride=trunk_stride(model), out_stride=out_stride, width=16).eval()
        side = math.ceil(size / out_stride)
        assert decoder(res5, (size, size)).shape == (1, 5, side, side)


def test_decoder_of_identity_kernels_repeats_pixels() -> None:
    """Except negative ones, which ReLU sets to 0; BatchNorm at initialisation divides by sqrt(1 + eps), three times."""
    decoder = Decoder(1, 1, in_stride=4, width=1).eval()
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
    nn.init.constant_(decoder.leave.weight, -1 / 9)
    nn.init.constant_(decoder.leave.bias, 0.5)  # type: ignore[arg-type]
    maps = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]])
    repeated = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).kron(torch.ones(4, 4))
    padded = nn.functional.pad(repeated, (1, 1, 1, 1))
    mean = padded.unfold(0, 3, 1).unfold(1, 3, 1).mean(dim=(2, 3))
    torch.testing.assert_close(decoder(maps, (8, 8))[0, 0], 0.5 - mean / (1 + 1e-5) ** 1.5, rtol=1e-6, atol=1e-6)


def test_decoder_widths_and_errors() -> None:
    decoder = Decoder(24, 3, in_stride=32, width=128)
    convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [128, 64, 32, 32, 32, 32, 3]
    narrow = Decoder(24, 3, in_stride=8, width=16)
    assert [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)] == [16, 16, 16, 16, 3]
    with pytest.raises(ValueError, match="in_stride must be a power of two, got 12"):
        Decoder(24, 3, in_stride=12)
    with pytest.raises(ValueError, match="out_stride must be at most in_stride=8, got 16"):
        Decoder(24, 3, in_stride=8, out_stride=16)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        Decoder(24, 3, in_stride=8, width=0)


JITTERED = ViewConfig(augment=AugmentConfig(grayscale_probability=0.0))
PHOTOMETRIC = ViewConfig(augment=replace(clean_view().augment, photometric_probability=0.5))
GRAYSCALE = ViewConfig(augment=replace(clean_view().augment, grayscale_probability=0.1))
JIGSAW = ViewConfig(crop=CropConfig(size=255), jigsaw=JigsawConfig(), augment=clean_view().augment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked_share": 1.0}, r"method.masked_share must be from 1/256 to 255/256, to the nearest 1/256, got 1.0"),
        ({"masked_share": 0.0015}, "got 0.0015"),  # would destroy nothing
        ({"masked_share": 0.999}, "got 0.999"),  # would destroy everything
        ({"corruption": "gaussian", "noise_std": 0.0}, "method.noise_std must be positive and finite, got 0.0"),
        ({"code_channels": 0}, "method.code_channels must be at least 1, got 0"),
        ({"decoder_width": 0}, "method.decoder_width must be at least 1, got 0"),
        ({"image_view": JITTERED}, "jitter_probability must be 0, since the image itself is the target, got 1.0"),
        ({"image_view": PHOTOMETRIC}, "photometric_probability must be 0, since .* is the target, got 0.5"),
        ({"image_view": GRAYSCALE}, "grayscale_probability must be 0, since .* is the target, got 0.1"),
        ({"image_view": JIGSAW}, "method.image_view must show the whole upright image"),
        ({"image_view": replace(clean_view(), rotation=True)}, "rotation=True; set neither"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder.Config(**changes).build(context(ResNetConfig(), 4, seed=0))


def test_recipes() -> None:
    large, small = autoencoder(), autoencoder_small()
    assert (large.model.name, large.method.image_view.crop.size) == ("resnet50", 224)
    assert (small.model.name, small.model.stem, small.method.image_view.crop.size) == ("resnet18", "small", 64)
    # The code has fewer numbers than the image.
    for config, side in ((large, 224 // 32), (small, 64 // 8)):
        method = config.method
        assert isinstance(method, Autoencoder.Config)
        assert method.code_channels * side**2 < 3 * method.image_view.crop.size**2 / 10
