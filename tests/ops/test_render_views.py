import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.ops import (
    ViewParameter,
    jigsaw_patches_reference,
    neutral_parameters,
    render_views,
    render_views_reference,
    rotate90_reference,
)
from sslfast.ops.pixels import ORDERS
from tests.cuda_emulation import emulate

ROOT = Path(__file__).resolve().parents[2]

PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # levels come out


def make(
    device: torch.device, *, batch: int = 3, side: int = 26, grid: int = 0, patch: int = 0, turns: bool = False
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Smooth crops with some noise, random parameters, and the options that place the pictures."""
    generator = torch.Generator().manual_seed(side + 100 * grid)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator) * 255
    crops = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    crops = (crops + torch.randn(crops.shape, generator=generator) * 8).clamp(0, 255).to(torch.uint8)
    pictures = max(1, grid * grid)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, pictures, generator=generator) * (high - low) + low

    columns = {
        ViewParameter.FLIP: uniform(0, 2).floor(),
        ViewParameter.JITTER: uniform(0, 4).floor().clamp(max=1),
        ViewParameter.JITTER_ORDER: uniform(0, 24).floor(),
        ViewParameter.BRIGHTNESS: uniform(0.6, 1.4),
        ViewParameter.CONTRAST: uniform(0.6, 1.4),
        ViewParameter.SATURATION: uniform(0.6, 1.4),
        ViewParameter.HUE: uniform(-0.5, 0.5),
        ViewParameter.PHOTOMETRIC: uniform(0, 2).floor(),
        ViewParameter.POSTERIZE_BITS: uniform(4, 9).floor(),
        ViewParameter.SHARPNESS: uniform(0.1, 1.9),
        ViewParameter.SOLARIZE_THRESHOLD: uniform(0, 257).floor(),
        ViewParameter.GRAYSCALE: uniform(0, 2).floor(),
        ViewParameter.BLUR_SIGMA: uniform(0, 2).floor() * uniform(0.1, 2.5),
        ViewParameter.LAST_SOLARIZE_THRESHOLD: uniform(0, 257).floor() + 0.3737,
    }
    options: dict[str, Any] = {}
    if grid:
        options["permutation"] = torch.stack([torch.randperm(pictures, generator=generator) for _ in range(batch)])
        options["offsets"] = torch.randint(side // grid - patch + 1, (batch, pictures, 2), generator=generator)
    if turns:
        options["quarter_turns"] = torch.arange(batch) - 1
    options = {name: value.to(device) for name, value in options.items()}
    if grid:
        options |= {"grid": grid, "patch_size": patch}
    return crops.to(device), stacked(columns).to(device), options


def stacked(columns: dict[ViewParameter, Tensor]) -> Tensor:
    """``[..., len(ViewParameter)]`` from one ``[...]`` for each parameter, neutral where none is given."""
    like = next(iter(columns.values()))
    neutral = [torch.full_like(like, value, dtype=torch.float32) for value in neutral_parameters()]
    return torch.stack([columns.get(p, neutral[p]).to(torch.float32) for p in ViewParameter], dim=-1)


def plain(batch: int, pictures: int = 1, **columns: float) -> Tensor:
    """Neutral parameters, except for the named columns."""
    parameters = torch.tensor(neutral_parameters()).expand(batch, pictures, -1).clone()
    for name, value in columns.items():
        parameters[..., ViewParameter[name.upper()]] = value
    return parameters


def assert_agrees(crops: Tensor, parameters: Tensor, **options: Any) -> None:
    """Compares with the reference on the CPU; a level of the photometric set may differ by one."""
    result = render_views(crops, parameters, **PLAIN, **options)
    moved = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    expected = render_views_reference(crops.cpu(), parameters.cpu(), **PLAIN, **moved)
    assert result.shape == expected.shape
    different = (result.cpu() - expected).abs() > 0.01
    photometric = parameters[..., ViewParameter.PHOTOMETRIC].flatten().cpu() != 0
    assert not different[~photometric].any()
    if photometric.any():
        assert different[photometric].float().mean() < 2e-3


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3, 31, 64, 100])
def test_whole_crops_equal_reference(device: torch.device, side: int, turns: bool) -> None:
    crops, parameters, options = make(device, batch=9, side=side, turns=turns)
    assert_agrees(crops, parameters, **options)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("side", "grid", "patch"), [(26, 3, 5), (26, 2, 13), (63, 3, 16), (255, 3, 64), (7, 7, 1)])
def test_jigsaw_equals_reference(device: torch.device, side: int, grid: int, patch: int, turns: bool) -> None:
    crops, parameters, options = make(device, batch=2, side=side, grid=grid, patch=patch, turns=turns)
    assert_agrees(crops, parameters, **options)


@pytest.mark.parametrize("side", [1, 2, 5, 16, 17, 33, 530])
def test_blur_of_every_radius(device: torch.device, side: int) -> None:
    sigma = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.4, 2.0, 3.3, 5.0])
    crops, _, _ = make(device, batch=8 if side < 100 else 2, side=side)
    for gray in (0.0, 1.0):
        parameters = plain(8, grayscale=gray)
        parameters[:, 0, ViewParameter.BLUR_SIGMA] = sigma
        assert_agrees(crops, parameters[-len(crops) :].to(device))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hue", [-1.0, -0.99, -0.75, -0.5, -1e-7, 0.5, 0.75, 1.0]),
        ("brightness", [0.0, 3.0, 100.0]),
        ("contrast", [0.0, 3.0, 100.0]),
        ("saturation", [0.0, 3.0, 100.0]),
        ("posterize_bits", [0.0, 0.5, 3.7, 7.99, 8.0]),
        ("sharpness", [-1e30, -3.0, 0.0, 50.0, 1e30]),
        ("solarize_threshold", [-1e30, -1.0, 0.5, 254.5, 1e30]),
        ("jitter_order", [0.5, 22.9, 23.0]),
        ("blur_sigma", [1e-45, 1e-30, 1e-3, 5.0]),
        ("flip", [-0.0, 1e-45, -3.0]),
    ],
)
def test_parameters_at_the_ends_of_their_range(device: torch.device, name: str, values: list[float]) -> None:
    """Right by the reference everywhere that the op accepts."""
    crops, parameters, _ = make(device, batch=len(values), side=24)
    parameters[..., ViewParameter.JITTER] = 1
    parameters[..., ViewParameter.PHOTOMETRIC] = float(name in ("posterize_bits", "sharpness", "solarize_threshold"))
    parameters[..., ViewParameter[name.upper()]] = torch.tensor(values, device=device)[:, None]
    result = render_views(crops, parameters, **PLAIN).cpu()
    expected = render_views_reference(crops.cpu(), parameters.cpu(), **PLAIN)
    different = (result - expected).abs() > (0.1 if max(values) == 100 else 0.01)
    assert different.float().mean() < (2e-3 if parameters[0, 0, ViewParameter.PHOTOMETRIC] else 1e-9)


def test_hue_of_a_turn_changes_nothing(device: torch.device) -> None:
    crops, _, _ = make(device, batch=2, side=20)
    for turns in (-1.0, 1.0):
        result = render_views(crops, plain(2, jitter=1, hue=turns).to(device), **PLAIN)
        torch.testing.assert_close(result, crops.float(), rtol=0, atol=1e-2)


def test_blur_of_one_point_is_the_kernel(device: torch.device) -> None:
    crops = torch.zeros(1, 3, 41, 41, dtype=torch.uint8, device=device)
    crops[..., 20, 20] = 255
    distance = torch.arange(-20, 21, device=device).double()
    taps = torch.where(distance.abs() <= 5, torch.exp(-0.5 * (distance / 1.5) ** 2), 0.0)  # ceil(3 * 1.5)
    taps /= taps.sum()
    result = render_views(crops, plain(1, blur_sigma=1.5).to(device), **PLAIN)
    expected = (255 * taps[:, None] * taps).expand(1, 3, 41, 41)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_blur_mirrors_the_border(device: torch.device) -> None:
    crops, _, _ = make(device, batch=1, side=24)
    mirrored = torch.nn.functional.pad(crops.float(), (6, 6, 6, 6), mode="reflect").to(torch.uint8)
    parameters = plain(1, blur_sigma=2.0).to(device)
    inside = render_views(mirrored, parameters, **PLAIN)[..., 6:-6, 6:-6]
    torch.testing.assert_close(render_views(crops, parameters, **PLAIN), inside, rtol=0, atol=1e-3)


def test_large_pictures_leave_shared_memory(device: torch.device) -> None:
    crops, parameters, options = make(device, batch=2, side=300)
    parameters[..., ViewParameter.PHOTOMETRIC] = 1
    assert_agrees(crops, parameters, **options)


@pytest.mark.parametrize("code", range(24))
def test_every_order(device: torch.device, code: int) -> None:
    crops, parameters, _ = make(device, batch=4, side=20)
    parameters[..., ViewParameter.JITTER] = 1
    parameters[..., ViewParameter.JITTER_ORDER] = code
    parameters[..., ViewParameter.PHOTOMETRIC] = 0
    assert_agrees(crops, parameters)
    assert sorted(ORDERS[code]) == [0, 1, 2, 3]


def test_neutral_parameters_only_move_pixels(device: torch.device) -> None:
    crops, _, options = make(device, batch=5, side=26, grid=3, patch=7, turns=True)
    for gate in (0.0, 1.0):  # gates open around neutral values change nothing, except autocontrast
        neutral = plain(5, 9, jitter=gate, jitter_order=17).to(device)
        result = render_views(crops, neutral, **PLAIN, **options)
        turned = rotate90_reference(crops, options["quarter_turns"])
        patches = jigsaw_patches_reference(turned, options["permutation"], options["offsets"], grid=3, patch_size=7)
        torch.testing.assert_close(result, patches.flatten(0, 1).float(), rtol=0, atol=2e-5)
    whole = render_views(crops, plain(5, flip=1.0).to(device), **PLAIN)
    torch.testing.assert_close(whole, crops.flip(-1).float(), rtol=0, atol=2e-5)


def test_known_values(device: torch.device) -> None:
    crops = torch.tensor([[100, 50], [200, 7]], dtype=torch.uint8, device=device).expand(1, 3, 2, 2).contiguous()
    gray = crops[:, 0].float()

    def levels(**columns: float) -> Tensor:
        return render_views(crops, plain(1, **columns).to(device), **PLAIN)[0, 0]

    torch.testing.assert_close(levels(jitter=1, brightness=1.3), (1.3 * gray[0]).clamp(max=255), rtol=0, atol=1e-3)
    mean = gray.mean() * (0.2989 + 0.587 + 0.114)
    torch.testing.assert_close(levels(jitter=1, contrast=0.5), 0.5 * gray[0] + 0.5 * mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(levels(jitter=1, hue=0.3), gray[0], rtol=0, atol=1e-3)  # grey has no hue
    # Posterize to 4 bits: 96, 48, 192, 0; solarize from 100: 96, 48, 63, 0; autocontrast: x * 255 / 96.
    stretched = torch.tensor([[255.0, 127.0], [167.0, 0.0]], device=device)
    torch.testing.assert_close(
        levels(photometric=1, posterize_bits=4, solarize_threshold=100), stretched, rtol=0, atol=2e-5
    )
    normal = render_views(crops, plain(1).to(device), mean=(0.5, 0.1, 0.2), std=(0.5, 2.0, 0.1))
    torch.testing.assert_close(normal[0, 1], (gray[0] / 255 - 0.1) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_and_layout(device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    crops, parameters, options = make(device, side=40, grid=3, patch=9)
    result = render_views(crops, parameters, dtype=dtype, channels_last=channels_last, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.dtype == dtype
    assert result.shape == (27, 3, 9, 9)
    assert result.is_contiguous(memory_format=layout)
    assert torch.equal(result, render_views(crops, parameters, **options).to(dtype))


def test_non_contiguous_and_empty(device: torch.device) -> None:
    crops, parameters, options = make(device, batch=4, side=24, grid=2, patch=10, turns=True)
    wide = torch.stack((crops, crops), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    strided = {name: torch.stack((v, v), dim=-1)[..., 0] if isinstance(v, Tensor) else v for name, v in options.items()}
    expected = render_views(crops, parameters, **options)
    assert torch.equal(render_views(wide, parameters.transpose(0, 1).contiguous().transpose(0, 1), **strided), expected)
    none = {name: v[:0] if isinstance(v, Tensor) else v for name, v in options.items()}
    assert render_views(crops[:0], parameters[:0], **none).shape == (0, 3, 10, 10)


def test_opcheck_and_compile(device: torch.device) -> None:
    crops, parameters, options = make(device, side=24, grid=2, patch=10, turns=True)
    numbers = (0.4, 0.5, 0.6, 0.2, 0.2, 0.2, torch.float16)
    placement = (options["quarter_turns"], options["permutation"], options["offsets"], 2, 10)
    torch.library.opcheck(
        torch.ops.sslfast.render_views.default, (crops, parameters, *placement, *numbers, True, True, True)
    )
    whole = (crops, parameters[:, :1], None, None, None, 0, 0, *numbers, False, True, True)
    torch.library.opcheck(torch.ops.sslfast.render_views.default, whole)
    compiled = torch.compile(render_views, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(crops, parameters, **options), render_views(crops, parameters, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permutation": torch.zeros(3, 4, dtype=torch.int64)}, "needs permutation and offsets, a whole crop neither"),
        ({"std": (0.1, 0.0, 0.1)}, "std must be above 0"),
        ({"mean": (0.1, 0.1)}, "must have 3 values"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"grid": 0, "permutation": torch.zeros(3, 4), "offsets": torch.zeros(3)}, "grid must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    crops, parameters, _ = make(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        render_views(crops, parameters, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2e6])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_bad_numbers_of_the_registered_op(name: str, value: float) -> None:
    crops, parameters, _ = make(torch.device("cpu"))
    numbers = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    numbers[name][1] = value
    args = (
        crops,
        parameters,
        None,
        None,
        None,
        0,
        8,
        *numbers["mean"],
        *numbers["std"],
        torch.float32,
        True,
        True,
        True,
    )
    for run in (torch.ops.sslfast.render_views, functools.partial(emulate, "render_views")):
        with pytest.raises(RuntimeError, match=rf"render_views: {name} must be .*in \["):
            run(*args)


def test_bad_tensors() -> None:
    crops, parameters, options = make(torch.device("cpu"), side=24, grid=2, patch=10, turns=True)
    for change, message in (
        ({"permutation": options["permutation"] + 1}, r"permutation must be in \[0, 4\), got 4"),
        ({"offsets": options["offsets"] + 3}, r"offsets must be in \[0, 2\]"),
        ({"patch_size": 13}, r"patch_size must be in \[1, 12\], the cell side of 24-pixel crops"),
        ({"quarter_turns": options["quarter_turns"][:2]}, r"quarter_turns must have shape \[B\] = \[3\]"),
        ({"offsets": options["offsets"].float()}, "offsets must be int64"),
        ({"photometric": False}, "photometric is False, but the gate of sample"),
        ({"blur": False}, "blur is False, but sample"),
    ):
        with pytest.raises(RuntimeError, match=message):
            render_views(crops, parameters, **(options | change))
    with pytest.raises(RuntimeError, match="crops must be uint8"):
        render_views(crops.float(), parameters, **options)
    n = len(ViewParameter)
    shapes = rf"parameters must be fp32 \[B, M, {n}\] = \[3, 1, {n}\], got \[3, 4, {n}\]"
    with pytest.raises(RuntimeError, match=shapes):
        render_views(crops, parameters)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("jitter_order", 24.0, r"jitter_order must be in \[0, 23\], got 24"),
        ("posterize_bits", 9.0, r"posterize_bits must be in \[0, 8\], got 9"),
        ("brightness", float("nan"), r"brightness must be in \[0, 100\], got nan"),
        ("hue", float("inf"), r"hue must be in \[-1, 1\], got inf"),
        ("hue", float("-inf"), r"hue must be in \[-1, 1\], got -inf"),
        ("hue", 1.01, r"hue must be in \[-1, 1\], got 1.01"),
        ("contrast", -0.1, r"contrast must be in \[0, 100\], got -0.1"),
        ("saturation", 101.0, r"saturation must be in \[0, 100\], got 101"),
        ("blur_sigma", float("nan"), r"blur_sigma must be in \[0, 5\], got nan"),
        ("blur_sigma", -0.1, r"blur_sigma must be in \[0, 5\], got -0.1"),
        ("blur_sigma", 5.01, r"blur_sigma must be in \[0, 5\], got 5.01"),
    ],
)
def test_parameter_out_of_range(name: str, value: float, message: str) -> None:
    crops, parameters, options = make(torch.device("cpu"), side=24, grid=2, patch=10)
    parameters[1, 2, ViewParameter[name.upper()]] = value
    with pytest.raises(RuntimeError, match=rf"render_views: {message} at sample 1, picture 2"):
        render_views(crops, parameters, **options)


def test_header_is_generated_from_the_table() -> None:
    script = ROOT / "sslfast" / "ops" / "view_parameters.py"
    header = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "csrc" / "view_parameters.h").read_text() == header, (
        "run: python sslfast/ops/view_parameters.py > csrc/view_parameters.h"
    )


def test_threads_do_not_change_the_result() -> None:
    crops, parameters, options = make(torch.device("cpu"), batch=8, side=50, grid=3, patch=14)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = render_views(crops, parameters, **options)
        torch.set_num_threads(3)
        three = render_views(crops, parameters, **options)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)
