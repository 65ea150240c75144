import pytest
import torch
from torch import Tensor

from sslfast.ops import rgb_to_lab, rgb_to_lab_reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COLOURS = {  # sRGB: L, a, b under D65
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (1.0, 0.0, 0.0): (53.2408, 80.0925, 67.2032),
    (0.0, 1.0, 0.0): (87.7347, -86.1827, 83.1793),
    (0.0, 0.0, 1.0): (32.2970, 79.1875, -107.8602),
    (1.0, 1.0, 0.0): (97.1393, -21.5537, 94.4780),
    (0.0, 1.0, 1.0): (91.1132, -48.0875, -14.1312),
    (1.0, 0.0, 1.0): (60.3242, 98.2343, -60.8249),
    (0.5, 0.5, 0.5): (53.3890, 0.0, 0.0),
}
SCIKIT_IMAGE = {  # what rgb2lab of scikit-image 0.26 says in float64
    (0.02, 0.03, 0.01): (1.8478, -1.3761, 1.6953),
    (0.8, 0.35, 0.1): (51.9501, 42.4716, 54.6889),
    (0.25, 0.6, 0.9): (61.2604, -1.5357, -46.2933),
    (0.99, 0.95, 0.97): (96.4801, 4.2866, -1.2265),
    (0.1, 0.12, 0.4): (16.1613, 24.3280, -42.5362),
    (0.45, 0.05, 0.3): (25.0732, 46.5600, -10.5672),
}


def make(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape[0], 3, *shape[1:], generator=generator, dtype=torch.float64).to(device, dtype)


def assert_exact(lab: Tensor, pixels: Tensor) -> None:
    torch.testing.assert_close(lab.double(), rgb_to_lab_reference(pixels.double()), rtol=0, atol=1e-3)


def test_known_colours(device: torch.device) -> None:
    pixels = torch.tensor(list(COLOURS), device=device).T[None, :, :, None]
    expected = torch.tensor(list(COLOURS.values()), device=device).T[None, :, :, None]
    torch.testing.assert_close(rgb_to_lab(pixels), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(rgb_to_lab_reference(pixels), expected, rtol=0, atol=2e-3)


def test_grey_has_no_colour(device: torch.device) -> None:
    grey = torch.linspace(0, 1, 1001, device=device).expand(1, 3, 1001)[..., None]
    lab = rgb_to_lab(grey)
    assert lab[:, 1:].abs().max() < 1e-3
    assert (lab[0, 0, 1:] > lab[0, 0, :-1]).all()


def test_every_level_and_both_sides_of_the_bends(device: torch.device) -> None:
    levels = torch.linspace(0, 1, 256, device=device)
    bends = torch.tensor([0.04045, 0.0404500037, 0.0404499993, 1e-30, 1e-40, 0.0931], device=device)
    values = torch.cat([levels, bends])
    pixels = torch.cartesian_prod(values, values[::17], values[::23]).T[None, :, :, None]
    assert_exact(rgb_to_lab(pixels), pixels)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 17, 31), (2, 33, 64), (1, 1, 1025)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    pixels = make(device, *shape, dtype=dtype)
    lab = rgb_to_lab(pixels)
    assert lab.dtype == torch.float32
    assert lab.shape == pixels.shape
    assert_exact(lab, pixels)


def test_agrees_with_scikit_image(device: torch.device) -> None:
    pixels = torch.tensor(list(SCIKIT_IMAGE), device=device).T[None, :, :, None]
    expected = torch.tensor(list(SCIKIT_IMAGE.values()), device=device).T[None, :, :, None]
    torch.testing.assert_close(rgb_to_lab(pixels), expected, rtol=0, atol=0.02)  # its white is off by 0.005


def test_values_outside_the_scale_follow_the_same_curves(device: torch.device) -> None:
    pixels = make(device, 1, 9, 9) * 6 - 2
    torch.testing.assert_close(rgb_to_lab(pixels).double(), rgb_to_lab_reference(pixels.double()), rtol=1e-5, atol=2e-3)
    pixels[0, 1, 2, 3] = float("nan")
    assert rgb_to_lab(pixels).isnan().sum() == 3


def test_memory_formats_and_empty(device: torch.device) -> None:
    pixels = make(device, 3, 19, 30)
    expected = rgb_to_lab(pixels)
    assert expected.is_contiguous()
    last = rgb_to_lab(pixels.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, expected)
    wide = torch.stack((pixels, pixels), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(rgb_to_lab(wide), expected)
    assert torch.equal(rgb_to_lab(pixels.mT.contiguous().mT), expected)
    assert rgb_to_lab(pixels[:0]).shape == (0, 3, 19, 30)
    assert rgb_to_lab(pixels[:, :, :0]).shape == (3, 3, 0, 30)


def test_opcheck_and_compile(device: torch.device) -> None:
    pixels = make(device, 2, 6, 7)
    torch.library.opcheck(torch.ops.sslfast.rgb_to_lab.default, (pixels, False))
    torch.library.opcheck(torch.ops.sslfast.rgb_to_lab.default, (pixels.permute(0, 2, 3, 1), True))
    compiled = torch.compile(rgb_to_lab, fullgraph=True, backend="aot_eager")
    for given in (pixels, pixels.to(memory_format=torch.channels_last)):
        assert torch.equal(compiled(given), rgb_to_lab(given))


def test_bad_arguments() -> None:
    pixels = make(torch.device("cpu"), 2, 6, 7)
    with pytest.raises(RuntimeError, match=r"rgb_to_lab: pixels must have shape \[N, 3, H, W\], got \[2, 1, 6, 7\]"):
        rgb_to_lab(pixels[:, :1])
    with pytest.raises(RuntimeError, match=r"pixels must have shape \[N, 3, H, W\], got \[3, 6, 7\]"):
        rgb_to_lab(pixels[0])
    with pytest.raises(RuntimeError, match=r"pixels must be float32, .*; convert bytes with .float\(\) / 255"):
        rgb_to_lab((pixels * 255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"requires a gradient, which the op does not compute; pass pixels.detach\(\)"):
        rgb_to_lab(pixels.requires_grad_())
    with torch.no_grad():
        assert not rgb_to_lab(pixels).requires_grad


def test_threads_do_not_change_the_result() -> None:
    pixels = make(torch.device("cpu"), 40, 50, 50)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rgb_to_lab(pixels)
        torch.set_num_threads(3)
        three = rgb_to_lab(pixels)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)
