import pytest
import torch
from torch import Tensor

from sslfast.ops import jigsaw_patches, jigsaw_patches_reference

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]


def make(
    device: torch.device,
    *,
    size: tuple[int, int] = (255, 255),
    grid: int = 3,
    patch: int = 64,
    dtype: torch.dtype = torch.uint8,
    batch: int = 3,
    channels: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(size) + patch)
    images = torch.randint(0, 256, (batch, channels, *size), generator=generator)
    permutation = torch.stack([torch.randperm(grid**2, generator=generator) for _ in range(batch)])
    room = [side // grid - patch + 1 for side in size]
    offsets = torch.stack([torch.randint(0, r, (batch, grid**2), generator=generator) for r in room], dim=2)
    offsets[0] = 0
    offsets[-1] = torch.tensor(room) - 1
    return images.to(device, dtype), permutation.to(device), offsets.to(device)


def by_slicing(images: Tensor, permutation: Tensor, offsets: Tensor, grid: int, patch: int) -> Tensor:
    rows = []
    for image, order, offset in zip(images, permutation.tolist(), offsets.tolist(), strict=True):
        for cell in order:
            y = cell // grid * (image.shape[1] // grid) + offset[cell][0]
            x = cell % grid * (image.shape[2] // grid) + offset[cell][1]
            rows.append(image[:, y : y + patch, x : x + patch])
    return torch.stack(rows).unflatten(0, (len(images), grid**2))


SHAPES = [((255, 255), 3, 64), ((96, 96), 3, 24), ((31, 50), 2, 13), ((9, 9), 3, 3), ((20, 17), 4, 1), ((8, 8), 1, 5)]


@pytest.mark.parametrize(("size", "grid", "patch"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_slicing_exactly(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], grid: int, patch: int
) -> None:
    images, permutation, offsets = make(device, size=size, grid=grid, patch=patch, dtype=dtype)
    expected = by_slicing(images, permutation, offsets, grid, patch)
    result = jigsaw_patches(images, permutation, offsets, grid=grid, patch_size=patch)
    assert torch.equal(result, expected)
    assert result.is_contiguous()
    assert torch.equal(jigsaw_patches_reference(images, permutation, offsets, grid=grid, patch_size=patch), expected)


def test_known_answer(device: torch.device) -> None:
    image = torch.arange(36, device=device).view(1, 1, 6, 6)
    offsets = torch.zeros(1, 4, 2, dtype=torch.int64, device=device)
    offsets[0, 3] = torch.tensor([1, 0])  # cell 3, the lower right one, starts one line lower
    result = jigsaw_patches(image, torch.tensor([[3, 0, 1, 2]], device=device), offsets, grid=2, patch_size=2)
    assert result.flatten(3).tolist() == [[[[27, 28, 33, 34]], [[0, 1, 6, 7]], [[3, 4, 9, 10]], [[18, 19, 24, 25]]]]


def test_permutation_moves_patches_and_does_not_change_them(device: torch.device) -> None:
    images, permutation, offsets = make(device)
    in_order = jigsaw_patches(images, torch.arange(9, device=device).expand(3, 9), offsets)
    moved = jigsaw_patches(images, permutation, offsets)
    assert torch.equal(moved, torch.stack([x[order] for x, order in zip(in_order, permutation, strict=True)]))


def test_strided_channels_last_offset_and_empty_input(device: torch.device) -> None:
    images, permutation, offsets = make(device)
    expected = jigsaw_patches(images, permutation, offsets)
    assert torch.equal(jigsaw_patches(images.to(memory_format=torch.channels_last), permutation, offsets), expected)
    strided = permutation.t().contiguous().t(), offsets.transpose(0, 2).contiguous().transpose(0, 2)
    wide = images.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(jigsaw_patches(wide, *strided), expected)
    shifted = torch.cat([images.flatten()[:1], images.flatten()])[1:].view_as(images)  # not aligned to a word
    assert torch.equal(jigsaw_patches(shifted, permutation, offsets), expected)
    assert jigsaw_patches(images[:0], permutation[:0], offsets[:0]).shape == (0, 9, 3, 64, 64)
    assert jigsaw_patches(images[:, :0], permutation, offsets).shape == (3, 9, 0, 64, 64)


def test_gradient(device: torch.device) -> None:
    images, permutation, offsets = make(device, size=(8, 7), grid=2, patch=2, dtype=torch.float64, batch=2, channels=2)
    images.requires_grad_()

    def apply(x: Tensor, order: Tensor) -> Tensor:
        return jigsaw_patches(x, order, offsets, grid=2, patch_size=2)

    apply(images, permutation).sum().backward()
    assert images.grad is not None
    assert images.grad.sum() == 2 * 2 * 4 * 4  # every shown pixel once, every other one never
    assert set(images.grad.unique().tolist()) == {0.0, 1.0}
    repeated = torch.tensor([[0, 0, 1, 3], [2, 2, 2, 2]], device=device)  # a cell shown twice gets both gradients
    for order in (permutation, repeated):
        assert torch.autograd.gradcheck(lambda x, order=order: apply(x, order), images)
        assert torch.autograd.gradgradcheck(lambda x, order=order: apply(x, order), images)


def test_opcheck_and_compile(device: torch.device) -> None:
    images, permutation, offsets = make(device, size=(12, 12), patch=3, dtype=torch.float32)
    op = torch.ops.sslfast.jigsaw_patches.default
    torch.library.opcheck(op, (images.requires_grad_(), permutation, offsets, 3, 3))
    torch.library.opcheck(op, (images.detach().to(torch.uint8), permutation, offsets, 3, 3))

    def loss(x: Tensor) -> Tensor:
        return (jigsaw_patches(x * 2, permutation, offsets, patch_size=3) ** 2).sum()

    expected = torch.autograd.grad(loss(images), images)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(images), images)[0], expected, rtol=0, atol=0)


def test_bad_arguments() -> None:
    images, permutation, offsets = make(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"patch_size must be in \[1, 85\].* got patch_size=86"):
        jigsaw_patches(images, permutation, offsets, patch_size=86)
    with pytest.raises(ValueError, match=r"grid must be in \[1, 1024\], got grid=0"):
        jigsaw_patches(images, permutation, offsets, grid=0)
    with pytest.raises(RuntimeError, match=r"images must have shape \[N, C, H, W\], got \[3, 255, 255\]"):
        jigsaw_patches(images[0], permutation, offsets)
    with pytest.raises(RuntimeError, match=r"permutation must have shape \[N, grid\*\*2\] = \[3, 9\], got \[3, 8\]"):
        jigsaw_patches(images, permutation[:, :8], offsets)
    with pytest.raises(
        RuntimeError, match=r"offsets must have shape \[N, grid\*\*2, 2\] = \[3, 9, 2\], got \[3, 9, 1\]"
    ):
        jigsaw_patches(images, permutation, offsets[:, :, :1])
    with pytest.raises(RuntimeError, match="permutation must be int64"):
        jigsaw_patches(images, permutation.int(), offsets)
    with pytest.raises(RuntimeError, match="offsets must be int64"):
        jigsaw_patches(images, permutation, offsets.float())
    with pytest.raises(RuntimeError, match="elements must have 1, 2, 4 or 8 bytes, got 16"):
        jigsaw_patches(images.to(torch.complex128), permutation, offsets)
    with pytest.raises(ValueError, match="jigsaw_patches: offsets is on meta and images on cpu"):
        jigsaw_patches(images, permutation, offsets.to("meta"))


def test_values_out_of_range_are_named() -> None:
    images, permutation, offsets = make(torch.device("cpu"))
    wrong = permutation.clone()
    wrong[1, 4] = 9
    with pytest.raises(RuntimeError, match=r"permutation must be in \[0, 9\), got 9 at sample 1, slot 4"):
        jigsaw_patches(images, wrong, offsets)
    wrong[1, 4] = -1
    with pytest.raises(RuntimeError, match=r"permutation must be in \[0, 9\), got -1 at sample 1, slot 4"):
        jigsaw_patches(images, wrong, offsets)
    wrong = offsets.clone()
    wrong[2, 7] = torch.tensor([22, 3])
    with pytest.raises(
        RuntimeError, match=r"in \[0, 21\] \(y\) and \[0, 21\] \(x\), got \(22, 3\) at sample 2, cell 7"
    ):
        jigsaw_patches(images, permutation, wrong)
    wrong[2, 7] = torch.tensor([0, -1])
    with pytest.raises(RuntimeError, match=r"got \(0, -1\) at sample 2, cell 7"):
        jigsaw_patches(images, permutation, wrong)
