import pytest
import torch
from torch import Tensor

from sslfast.ops import rotate90, rotate90_reference

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]


def make(device: torch.device, side: int, dtype: torch.dtype = torch.uint8, batch: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(side)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=generator)
    turns = torch.arange(batch) - batch // 2
    return images.to(device, dtype), turns.to(device)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 32, 33, 64, 100, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch_rot90_exactly(device: torch.device, dtype: torch.dtype, side: int) -> None:
    images, turns = make(device, side, dtype)
    expected = torch.stack([torch.rot90(x, int(k), (-2, -1)) for x, k in zip(images, turns, strict=True)])
    assert torch.equal(rotate90(images, turns), expected)
    assert torch.equal(rotate90_reference(images, turns), expected)
    assert rotate90(images, turns).is_contiguous()


def test_known_answer(device: torch.device) -> None:
    images = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8, device=device).expand(4, 1, 2, 2)
    turned = rotate90(images, torch.arange(4, device=device)).flatten(1).tolist()
    assert turned == [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]


def test_turns_are_taken_modulo_4(device: torch.device) -> None:
    images, _ = make(device, 7, batch=6)
    turns = torch.tensor([-1, 3, 7, 2**62 + 3, -(2**63) + 3, -5], device=device)
    assert torch.equal(rotate90(images, turns), rotate90(images, torch.full_like(turns, 3)))


def test_four_turns_are_the_identity(device: torch.device) -> None:
    images, turns = make(device, 37)
    result = images
    for _ in range(4):
        result = rotate90(result, turns)
    assert torch.equal(result, images)
    assert torch.equal(rotate90(rotate90(images, turns), -turns), images)


def test_strided_channels_last_offset_and_empty_input(device: torch.device) -> None:
    images, turns = make(device, 12)
    expected = rotate90(images, turns)
    assert torch.equal(rotate90(images.to(memory_format=torch.channels_last), turns), expected)
    wide = torch.zeros(9, 3, 12, 24, dtype=torch.uint8, device=device)
    wide[..., ::2] = images
    assert torch.equal(rotate90(wide[..., ::2], torch.stack([turns, turns], 1)[:, 0]), expected)
    shifted = torch.cat([images.flatten()[:1], images.flatten()])[1:].view_as(images)  # not aligned to a word
    assert torch.equal(rotate90(shifted, turns), expected)
    assert rotate90(images[:0], turns[:0]).shape == (0, 3, 12, 12)
    assert rotate90(images[:, :0], turns).shape == (9, 0, 12, 12)


def test_gradient_is_the_inverse_rotation(device: torch.device) -> None:
    images, turns = make(device, 4, torch.float64, batch=5)
    images.requires_grad_()
    weight = torch.randn_like(images)
    (rotate90(images, turns) * weight).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, rotate90(weight, -turns))
    assert torch.autograd.gradcheck(lambda x: rotate90(x, turns), images)
    assert torch.autograd.gradgradcheck(lambda x: rotate90(x, turns), images)


def test_opcheck_and_compile(device: torch.device) -> None:
    images, turns = make(device, 6, torch.float32, batch=4)
    torch.library.opcheck(torch.ops.sslfast.rotate90.default, (images.requires_grad_(), turns))
    torch.library.opcheck(torch.ops.sslfast.rotate90.default, (images.detach().to(torch.uint8), turns))

    def loss(x: Tensor) -> Tensor:
        return (rotate90(x * 2, turns) ** 2).sum()

    expected = torch.autograd.grad(loss(images), images)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(images), images)[0], expected, rtol=0, atol=0)


def test_bad_arguments() -> None:
    images, turns = make(torch.device("cpu"), 6)
    with pytest.raises(RuntimeError, match=r"images must be square \(H == W\), got \[9, 3, 6, 5\]; crop them first"):
        rotate90(images[..., :5], turns)
    with pytest.raises(RuntimeError, match=r"images must have shape \[N, C, H, W\], got \[3, 6, 6\]"):
        rotate90(images[0], turns)
    with pytest.raises(RuntimeError, match=r"quarter_turns must have shape \[N\] = \[9\], got \[8\]"):
        rotate90(images, turns[:8])
    with pytest.raises(RuntimeError, match="quarter_turns must be int64"):
        rotate90(images, turns.int())
    with pytest.raises(RuntimeError, match="elements must have 1, 2, 4 or 8 bytes, got 16"):
        rotate90(images.to(torch.complex128), turns)
    with pytest.raises(ValueError, match="rotate90: quarter_turns is on meta and images on cpu"):
        rotate90(images, turns.to("meta"))
