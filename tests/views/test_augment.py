"""Each pixel operation against torchvision.transforms.v2.functional on float images and against PIL on bytes."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from sslfast.ops import ViewParameter, pixels, render_views
from sslfast.ops.philox import random_uint32
from sslfast.views.augment import _RULES, WORD_GROUPS, AugmentConfig, draw_pixel_parameters

N = 8
JITTERS = slice(ViewParameter.BRIGHTNESS, ViewParameter.HUE + 1)
FACTORS_OF_JITTER = slice(ViewParameter.BRIGHTNESS, ViewParameter.HUE)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
OFF = {"flip_probability": 0.0, "jitter_probability": 0.0, "grayscale_probability": 0.0, **PLAIN}


def pictures(side: int = 37) -> Tensor:
    """``[8, 3, side, side]`` uint8: smooth, noisy, grey, flat, black, white, two-level and low-contrast images."""
    generator = torch.Generator().manual_seed(side)
    noise = torch.randint(0, 256, (N, 3, side, side), generator=generator, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    noise[0] = (torch.stack([y, x, (y + x) / 2]) * 255).to(torch.uint8)
    noise[2] = noise[2, :1]
    noise[3] = torch.tensor([10, 130, 250], dtype=torch.uint8)[:, None, None]
    noise[4], noise[5] = 0, 255
    noise[6] = (noise[6] > 127) * 255
    noise[7] = 100 + noise[7] % 40
    return noise


def levels(images: Tensor) -> Tensor:
    return images.to(torch.float32)


def pil(images: Tensor, function: Callable[[Image.Image, int], Image.Image]) -> Tensor:
    """Apply a PIL function to every image: (image, its number) -> image."""
    arrays = [np.asarray(function(Image.fromarray(x.permute(1, 2, 0).numpy()), i)) for i, x in enumerate(images)]
    return torch.stack([torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]).to(torch.float32)


def parameters(count: int = N, config: AugmentConfig | None = None, seed: int = 0) -> Tensor:
    words = random_uint32(torch.arange(count), sum(WORD_GROUPS), seed=seed, stream=32, step=0)
    return draw_pixel_parameters(words, config or AugmentConfig(photometric_probability=1.0))


def augment(
    images: Tensor, p: Tensor, config: AugmentConfig, *, dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:  # fmt: skip
    """The op on whole crops."""
    return render_views(images, p[:, None], mean=config.mean, std=config.std, dtype=dtype, channels_last=channels_last)


FACTORS = torch.tensor([0.6, 1.4, 1.0, 0.0, 0.73, 1.21, 2.0, 0.5])
TURNS = torch.tensor([0.2, -0.2, 0.5, 0.1, -0.5, 0.0, 0.07, -0.13])


@pytest.mark.parametrize(
    ("kind", "reference", "enhancer"),
    [
        (pixels.BRIGHTNESS, tvf.adjust_brightness, ImageEnhance.Brightness),
        (pixels.CONTRAST, tvf.adjust_contrast, ImageEnhance.Contrast),
        (pixels.SATURATION, tvf.adjust_saturation, ImageEnhance.Color),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_blends(kind: int, reference: Callable, enhancer: type) -> None:
    images = pictures()
    result = pixels.blend_(levels(images), torch.full((N,), kind), FACTORS)
    expected = [reference(x / 255, float(f)) * 255 for x, f in zip(levels(images), FACTORS, strict=True)]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-3)
    from_pil = pil(images, lambda image, i: enhancer(image).enhance(float(FACTORS[i])))
    # PIL rounds the grey level to an integer and truncates the result.
    torch.testing.assert_close(result, from_pil, rtol=0, atol=1.25)


def test_hue() -> None:
    images = pictures()
    result = pixels.shift_hue_(levels(images), TURNS)
    expected = [tvf.adjust_hue(x / 255, float(t)) * 255 for x, t in zip(levels(images), TURNS, strict=True)]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-2)
    from_pil = pil(images, lambda image, i: tvf.adjust_hue(image, float(TURNS[i])))
    assert (result - from_pil).abs().mean() < 1  # PIL's hue and saturation have 8 bits
    assert (result - from_pil).abs().max() < 12


def test_hue_keeps_grey_and_returns_after_a_full_turn() -> None:
    images = levels(pictures())
    grey = images[2:3].clone()
    assert torch.equal(pixels.shift_hue_(grey.clone(), torch.tensor([0.3])), grey)
    half = pixels.shift_hue_(images.clone(), torch.full((N,), 0.5))
    torch.testing.assert_close(pixels.shift_hue_(half, torch.full((N,), 0.5)), images, rtol=0, atol=1e-2)


def test_posterize_equals_pil() -> None:
    images, bits = pictures(), torch.tensor([4, 5, 6, 7, 8, 4, 5, 6])
    expected = pil(images, lambda image, i: ImageOps.posterize(image, int(bits[i])))
    assert torch.equal(pixels.posterize_(levels(images), bits), expected)
    assert torch.equal(
        expected, torch.stack([tvf.posterize(x, int(b)) for x, b in zip(images, bits, strict=True)]).float()
    )


@pytest.mark.parametrize("side", [37, 3, 2, 1])
def test_sharpness_equals_pil(side: int) -> None:
    images, factors = pictures(side), torch.tensor([0.1, 1.9, 1.0, 0.5, 1.5, 0.3, 1.7, 0.9])
    result = pixels.sharpen_(levels(images), factors)
    expected = pil(images, lambda image, i: ImageEnhance.Sharpness(image).enhance(float(factors[i])))
    torch.testing.assert_close(result, expected, rtol=0, atol=1.0)
    assert (result != expected).float().mean() < 1e-3
    if side >= 3:
        close = torch.stack([tvf.adjust_sharpness(x, float(f)) for x, f in zip(images, factors, strict=True)]).float()
        torch.testing.assert_close(result, close, rtol=0, atol=1.0)


def test_solarize_equals_pil() -> None:
    images, threshold = pictures(), torch.tensor([0, 1, 64, 128, 200, 255, 256, 100])
    expected = pil(images, lambda image, i: ImageOps.solarize(image, int(threshold[i])))
    assert torch.equal(pixels.solarize_(levels(images), threshold), expected)


def test_autocontrast_equals_pil() -> None:
    images = pictures()
    result = pixels.autocontrast_(levels(images))
    expected = pil(images, lambda image, _: ImageOps.autocontrast(image))
    torch.testing.assert_close(result, expected, rtol=0, atol=1.0)
    assert (result >= expected).all()  # below only where PIL's table falls short of a whole number
    torch.testing.assert_close(result, torch.stack([tvf.autocontrast(x) for x in images]).float(), rtol=0, atol=1.0)


@pytest.mark.parametrize("side", [224, 37, 5, 2, 1])
def test_blur_equals_torchvision(side: int) -> None:
    images, sigma = levels(pictures(side)), torch.tensor([0.1, 0.3, 0.5, 1.0, 1.3, 1.7, 2.0, 5.0])
    result = pixels.gaussian_blur(images, sigma)
    sizes = [2 * min(math.ceil(3 * s), side - 1) + 1 for s in sigma.tolist()]
    expected = [tvf.gaussian_blur(x, [k, k], [float(s)] * 2) for x, s, k in zip(images, sigma, sizes, strict=True)]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-3)


def test_blur_is_near_simclr_and_pil() -> None:
    images, sigma = pictures(224)[:7], torch.linspace(1.0, 2.0, 7)
    result = pixels.gaussian_blur(levels(images), sigma)
    tenth = [tvf.gaussian_blur(x, [23, 23], [float(s)] * 2) for x, s in zip(levels(images), sigma, strict=True)]
    torch.testing.assert_close(result, torch.stack(tenth), rtol=0, atol=0.5)
    from_pil = pil(images, lambda image, i: image.filter(ImageFilter.GaussianBlur(float(sigma[i]))))
    inside = slice(7, -7)  # PIL repeats the border
    torch.testing.assert_close(result[..., inside, inside], from_pil[..., inside, inside], rtol=0, atol=5.0)
    assert (result[0] - from_pil[0]).abs().mean() < 0.6  # the smooth one


def test_blur_leaves_sigma_0_and_flat_images_alone() -> None:
    images = levels(pictures())
    assert torch.equal(pixels.gaussian_blur(images, torch.zeros(N)), images)
    flat = images[3:6]
    torch.testing.assert_close(pixels.gaussian_blur(flat, torch.tensor([0.2, 2.0, 5.0])), flat, rtol=0, atol=1e-3)


def test_blur_comes_after_grayscale() -> None:
    config = AugmentConfig(**(OFF | {"grayscale_probability": 1.0, "blur_probability": 1.0}))
    images, p = pictures(), parameters(config=config)
    gray = tvf.rgb_to_grayscale(levels(images), num_output_channels=3)
    expected = pixels.gaussian_blur(gray, p[:, ViewParameter.BLUR_SIGMA]) / 255
    torch.testing.assert_close(augment(images, p, config), expected, rtol=0, atol=1e-5)


def test_solarize_comes_last_and_equals_pil() -> None:
    """As BYOL, Barlow Twins and DINO: crop, flip, jitter, grayscale, blur, solarize."""
    config = AugmentConfig(**(OFF | {"solarize_probability": 1.0, "solarize_threshold": 100.0}))
    images = pictures()
    expected = pil(images, lambda image, _: ImageOps.solarize(image, 100)) / 255
    torch.testing.assert_close(augment(images, parameters(config=config), config), expected, rtol=0, atol=1e-6)
    both = AugmentConfig(**(OFF | {"solarize_probability": 1.0, "blur_probability": 1.0}))
    p = parameters(config=both)
    blurred = pixels.gaussian_blur(levels(images), p[:, ViewParameter.BLUR_SIGMA])
    off_threshold = (blurred - 128).abs() > 1e-2  # float32 rounding decides there
    expected = torch.where(blurred >= 128, 255 - blurred, blurred) / 255
    assert ((augment(images, p, both) - expected).abs()[off_threshold] < 1e-5).all()


def test_solarize_leaves_the_other_draws_alone() -> None:
    some, none = parameters(4000, AugmentConfig(solarize_probability=0.2)), parameters(4000, AugmentConfig())
    drawn = some[:, ViewParameter.LAST_SOLARIZE_THRESHOLD]
    assert set(drawn.unique().tolist()) == {128.0, 256.0}
    assert abs((drawn == 128).float().mean() - 0.2) < 0.02
    assert torch.equal(
        some[:, : ViewParameter.LAST_SOLARIZE_THRESHOLD], none[:, : ViewParameter.LAST_SOLARIZE_THRESHOLD]
    )
    assert (none[:, ViewParameter.LAST_SOLARIZE_THRESHOLD] == 256).all()


def test_luminance_equals_torchvision() -> None:
    images = levels(pictures())
    torch.testing.assert_close(pixels.luminance(images), tvf.rgb_to_grayscale(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_in_every_order_equals_torchvision(order: tuple[int, ...]) -> None:
    config = AugmentConfig(**(OFF | {"jitter_probability": 1.0}))
    images, p = pictures(11), parameters(config=config)
    p[:, ViewParameter.JITTER_ORDER] = pixels.ORDERS.index(order)
    result = augment(images, p, config)
    functions = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for i in range(N):
        values = p[i, JITTERS].tolist()
        expected = levels(images[i]) / 255
        for kind in order:
            expected = functions[kind](expected, values[kind])
        torch.testing.assert_close(result[i], expected, rtol=0, atol=5e-5)


def test_mixed_orders_and_gates_equal_one_image_at_a_time() -> None:
    config = AugmentConfig(jitter_probability=0.7, photometric_probability=0.5, blur_probability=0.5)
    count = 64
    images, p = pictures(20).repeat(8, 1, 1, 1), parameters(count, config)
    assert 0 < p[:, ViewParameter.JITTER].sum() < count
    assert 0 < p[:, ViewParameter.PHOTOMETRIC].sum() < count
    result = augment(images, p, config)
    alone = [augment(images[i : i + 1], p[i : i + 1], config) for i in range(count)]
    assert torch.equal(result, torch.cat(alone))
    # Level operations may move by one level where a sum crosses a whole number, and autocontrast widens that.
    reference = pixels.augment(images, p, mean=config.mean, std=config.std)
    assert ((reference - result).abs() > 2e-5).float().mean() < 1e-3


def test_photometric_order_equals_pil_chain() -> None:
    config = AugmentConfig(**(OFF | {"photometric_probability": 1.0}))
    images, p = pictures(), parameters(config=config)

    def chain(image: Image.Image, i: int) -> Image.Image:
        image = ImageOps.posterize(image, int(p[i, ViewParameter.POSTERIZE_BITS]))
        image = ImageEnhance.Sharpness(image).enhance(float(p[i, ViewParameter.SHARPNESS]))
        image = ImageOps.solarize(image, int(p[i, ViewParameter.SOLARIZE_THRESHOLD]))
        return ImageOps.autocontrast(image)

    different = (augment(images, p, config) * 255 - pil(images, chain)).abs() > 0.01
    assert different.float().mean() < 1e-3  # none here; float32 rounding could move a level across the threshold


def test_flip_grayscale_and_normalise_are_exact() -> None:
    images = pictures()
    mirrored = AugmentConfig(**(OFF | {"flip_probability": 1.0}))
    torch.testing.assert_close(augment(images, parameters(config=mirrored), mirrored), images.flip(-1) / 255)
    grey = AugmentConfig(**(OFF | {"grayscale_probability": 1.0}))
    expected = tvf.rgb_to_grayscale(images / 255, num_output_channels=3)
    torch.testing.assert_close(augment(images, parameters(config=grey), grey), expected, rtol=0, atol=1e-6)
    scaled = AugmentConfig(**(OFF | {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}))
    expected = tvf.normalize(images / 255, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    torch.testing.assert_close(augment(images, parameters(config=scaled), scaled), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("off", ["brightness", "contrast", "saturation", "hue"])
def test_strength_zero_is_off(off: str) -> None:
    config = AugmentConfig(**(OFF | {"jitter_probability": 1.0, off: 0.0}))
    full = AugmentConfig(**(OFF | {"jitter_probability": 1.0}))
    images = pictures()
    p = parameters(config=config)
    # The identity factor drawn at strength 0 gives the same through the config that has the operation.
    torch.testing.assert_close(augment(images, p, config), augment(images, p, full), rtol=0, atol=1e-5)
    none = AugmentConfig(
        **(OFF | {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0})
    )
    torch.testing.assert_close(augment(images, parameters(config=none), none), images / 255)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_dtype_and_memory_format(dtype: torch.dtype, channels_last: bool) -> None:
    config = AugmentConfig()
    images, p = pictures(), parameters(config=config)
    result = augment(images, p, config, dtype=dtype, channels_last=channels_last)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=expected)
    assert torch.equal(result, augment(images, p, config).to(dtype))


def test_input_is_left_alone_and_empty_batch_works() -> None:
    config = AugmentConfig(photometric_probability=1.0)
    images = pictures()
    kept = images.clone()
    augment(images, parameters(), config)
    assert torch.equal(images, kept)
    assert augment(images[:0], parameters(0), config).shape == (0, 3, 37, 37)


def test_compiles_in_one_graph_equal_to_eager() -> None:
    config = AugmentConfig(photometric_probability=0.5, blur_probability=0.5)
    images, p = pictures(9), parameters(config=config)
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")(images, p, config)
    torch.testing.assert_close(compiled, augment(images, p, config), rtol=0, atol=1e-5)


def test_draws_cover_their_ranges() -> None:
    config = AugmentConfig(photometric_probability=0.66, blur_probability=0.4)
    count = 20_000
    p = parameters(count, config)
    for gate, probability in (
        (p[:, ViewParameter.FLIP], 0.5),
        (p[:, ViewParameter.JITTER], 1.0),
        (p[:, ViewParameter.PHOTOMETRIC], 0.66),
        (p[:, ViewParameter.GRAYSCALE], 0.2),
        (p[:, ViewParameter.BLUR_SIGMA] > 0, 0.4),
    ):
        assert abs(gate.float().mean() - probability) < 0.015
    assert p.shape == (count, len(ViewParameter))
    for values, low, high in (
        (p[:, FACTORS_OF_JITTER], 0.6, 1.4),
        (p[:, ViewParameter.HUE], -0.2, 0.2),
        (p[:, ViewParameter.SHARPNESS], 0.1, 1.9),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)
    sigma = p[:, ViewParameter.BLUR_SIGMA]
    sigma = sigma[sigma > 0]
    assert 0.1 <= sigma.min() < 0.11
    assert 1.99 < sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 0.02
    assert p[:, ViewParameter.POSTERIZE_BITS].unique().tolist() == [4, 5, 6, 7, 8]
    assert p[:, ViewParameter.SOLARIZE_THRESHOLD].unique().tolist() == list(range(257))
    jitter_order = torch.tensor(pixels.ORDERS)[p[:, ViewParameter.JITTER_ORDER].long()]
    orders, counts = jitter_order.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 0.8 * count / 24
    assert (jitter_order.sort(dim=1).values == torch.arange(4)).all()


def test_probability_bounds_and_independence_of_strengths() -> None:
    never = parameters(1000, AugmentConfig(**OFF))
    gates = ("BLUR_SIGMA", "FLIP", "JITTER", "GRAYSCALE", "PHOTOMETRIC")
    assert not never[:, [ViewParameter[gate] for gate in gates]].any()
    one, other = parameters(50, AugmentConfig()), parameters(50, AugmentConfig(brightness=0.0, hue=0.5))
    assert torch.equal(one[:, FACTORS_OF_JITTER][:, 1:], other[:, FACTORS_OF_JITTER][:, 1:])
    assert torch.equal(one[:, ViewParameter.SHARPNESS], other[:, ViewParameter.SHARPNESS])
    assert (other[:, ViewParameter.BRIGHTNESS] == 1).all()
    assert parameters(50, AugmentConfig(brightness=2.0))[:, FACTORS_OF_JITTER].min() >= 0


def test_every_parameter_has_a_rule() -> None:
    assert list(_RULES) == list(ViewParameter)
