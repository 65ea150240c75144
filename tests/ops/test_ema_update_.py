import copy

import pytest
import torch
from torch import Tensor, nn

from sslfast.bench.ops import resnet50_shapes
from sslfast.ops import ema_update_, ema_update_reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Odd sizes, a scalar, whole chunks of the CUDA kernel (4096) and one element more or less.
SHAPES = [(7,), (), (3, 5, 1, 1), (0,), (4096,), (4097,), (2, 4095), (64, 3, 7, 7), (1,), (3, 0, 2)]


def make(
    device: torch.device,
    target_dtype: torch.dtype = torch.float32,
    source_dtype: torch.dtype = torch.float32,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sources = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(device, target_dtype) for t in targets], [s.to(device, source_dtype) for s in sources]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides."""
    return [tensor.detach().clone(memory_format=torch.preserve_format) for tensor in tensors]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other), f"tensor {i}"


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATS, ids=str)
def test_equals_float64(
    device: torch.device, target_dtype: torch.dtype, source_dtype: torch.dtype, momentum: float
) -> None:
    targets, sources = make(device, target_dtype, source_dtype)
    expected = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources, strict=True)]
    reference = clones(targets)
    ema_update_reference(reference, sources, momentum=momentum)
    ema_update_(targets, sources, momentum=momentum)
    # Half a unit in the last place of the stored type, and the rounding of fp32 arithmetic.
    relative = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[target_dtype]
    absolute = 1e-14 if torch.float64 in (target_dtype, source_dtype) else 1e-6
    if target_dtype == torch.float16:
        absolute = 1e-6  # subnormals
    for mine, theirs, exact in zip(targets, reference, expected, strict=True):
        assert mine.dtype == target_dtype
        torch.testing.assert_close(mine.double(), exact, rtol=1.01 * relative, atol=absolute)
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2.02 * relative, atol=absolute)


def test_known_answer(device: torch.device) -> None:
    targets = [torch.tensor([1.0, 2.0], device=device), torch.tensor(8.0, device=device)]
    sources = [torch.tensor([3.0, -2.0], device=device), torch.tensor(0.0, device=device)]
    for first, second in (([1.5, 1.0], 6.0), ([1.875, 0.25], 4.5)):
        ema_update_(targets, sources, momentum=0.75)
        assert targets[0].tolist() == first
        assert targets[1].item() == second


def test_steps_follow_the_closed_form(device: torch.device) -> None:
    targets, sources = make(device, torch.float64, torch.float64)
    start = clones(targets)
    for _ in range(50):
        ema_update_(targets, sources, momentum=0.9)
    for mine, old, source in zip(targets, start, sources, strict=True):
        torch.testing.assert_close(mine, source + 0.9**50 * (old - source), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ends_and_fixed_points_are_exact(device: torch.device, dtype: torch.dtype) -> None:
    targets, sources = make(device, dtype, dtype)
    kept = clones(targets)
    ema_update_(kept, sources, momentum=1.0)
    assert_equal(kept, targets)
    ema_update_(targets, sources, momentum=0.0)
    assert_equal(targets, sources)
    for momentum in (0.1, 0.5, 0.9, 0.999):
        ema_update_(targets, sources, momentum=momentum)
        assert_equal(targets, sources)


def test_targets_may_be_their_own_sources(device: torch.device) -> None:
    targets, _ = make(device)
    before = clones(targets)
    ema_update_(targets, targets, momentum=0.3)
    assert_equal(targets, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_momentum_in_a_tensor(device: torch.device, dtype: torch.dtype) -> None:
    targets, sources = make(device)
    number = torch.tensor(0.996, dtype=dtype)
    expected = clones(targets)
    ema_update_(expected, sources, momentum=number.item())
    ema_update_(targets, sources, momentum=number.to(device))
    assert_equal(targets, expected)


def test_captured_graph_follows_a_schedule(device: torch.device) -> None:
    targets, sources = make(device)
    momentum = torch.tensor(0.0, device=device)
    if device.type == "cuda":
        ema_update_(clones(targets), sources, momentum=momentum)  # loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_(targets, sources, momentum=momentum)
        step = graph.replay
    else:

        def step() -> None:
            ema_update_(targets, sources, momentum=momentum)

    for value in (0.9, 0.99, 0.5):
        expected = clones(targets)
        momentum.fill_(value)
        ema_update_(expected, sources, momentum=momentum.clone())
        step()
        assert_equal(targets, expected)


def test_mixed_dtypes_in_one_call(device: torch.device) -> None:
    targets, sources = make(device, shapes=[(33,)] * 16)
    targets = [t.to(FLOATS[i // 4]) for i, t in enumerate(targets)]
    sources = [s.to(FLOATS[i % 4]) for i, s in enumerate(sources)]
    expected = clones(targets)
    for target, source in zip(expected, sources, strict=True):
        ema_update_([target], [source], momentum=0.7)
    ema_update_(targets, sources, momentum=0.7)
    assert_equal(targets, expected)


@pytest.mark.parametrize("count", [167, 168, 169, 500])
def test_more_tensors_than_one_launch_holds(device: torch.device, count: int) -> None:
    targets, sources = make(device, shapes=[(i % 11,) for i in range(count)] + [(10_001,)])
    expected = [torch.lerp(t, s, 0.25) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, momentum=0.75)
    for mine, other in zip(targets, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_resnet50(device: torch.device) -> None:
    shapes = resnet50_shapes()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032
    small = [tuple(1 + size // 16 for size in shape) for shape in shapes]
    targets, sources = make(device, shapes=small)
    expected = [torch.lerp(t, s, 0.001) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, momentum=0.999)
    for mine, other in zip(targets, expected, strict=True):
        torch.testing.assert_close(mine, other)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x [N, C, H, W] with another memory layout."""
    big = x.new_zeros(2 * x.shape[0], *x.shape[1:])
    shifted = x.new_zeros(x.numel() + 1)[1:].view(x.shape)  # not at a multiple of 16 bytes
    return {
        "contiguous": x.clone(),
        "channels_last": x.clone(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).clone(memory_format=torch.contiguous_format).transpose(0, 3),
        "strided": big[::2].copy_(x),
        "shifted": shifted.copy_(x),
    }


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 4, 1, 1), (17, 16, 5, 7)], ids=str)
def test_non_contiguous(device: torch.device, shape: tuple[int, ...]) -> None:
    (target,), (source,) = make(device, shapes=[shape])
    expected = target.clone()
    ema_update_([expected], [source], momentum=0.3)
    for target_name, x in layouts(target).items():
        for source_name, y in layouts(source).items():
            mine = layouts(x)[target_name]
            strides = mine.stride()
            assert mine.is_contiguous() == (target_name in ("contiguous", "shifted")) or shape[2:] == (1, 1)
            ema_update_([mine], [y], momentum=0.3)
            assert torch.equal(mine, expected), f"{target_name} from {source_name}"
            assert mine.stride() == strides


def test_strided_target_leaves_its_neighbours(device: torch.device) -> None:
    matrix = torch.arange(12.0, device=device).view(3, 4)
    columns = [matrix[:, 0], matrix[:, 2]]  # interleaved, no shared element
    ema_update_(columns, [torch.zeros(3, device=device), torch.full((3,), 4.0, device=device)], momentum=0.5)
    assert matrix.tolist() == [[0.0, 1.0, 3.0, 3.0], [2.0, 5.0, 5.0, 7.0], [4.0, 9.0, 7.0, 11.0]]


def test_expanded_source_and_own_strided_source(device: torch.device) -> None:
    target = torch.zeros(4, 3, device=device)
    ema_update_([target], [torch.tensor([1.0, 2.0, 3.0], device=device).expand(4, 3)], momentum=0.5)
    assert target.tolist() == [[0.5, 1.0, 1.5]] * 4
    column = target[:, 1]
    ema_update_([column], [column], momentum=0.25)
    assert target.tolist() == [[0.5, 1.0, 1.5]] * 4


def test_empty(device: torch.device) -> None:
    ema_update_([], [], momentum=0.5)
    ema_update_([], [], momentum=torch.tensor(0.5, device=device))
    targets, sources = [torch.zeros(0, device=device)], [torch.zeros(0, device=device, dtype=torch.bfloat16)]
    ema_update_(targets, sources, momentum=0.5)
    assert targets[0].shape == (0,)


def test_modules_train_on(device: torch.device) -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student)
    before = clones(list(teacher.parameters()))
    student(torch.randn(2, 3, 5, 5, device=device)).square().sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    ema_update_(teacher.parameters(), student.parameters(), momentum=0.75)  # leaves that require grad
    for mine, old in zip(teacher.parameters(), before, strict=True):
        torch.testing.assert_close(mine, old + 0.25)
        assert mine.is_leaf
        assert mine.requires_grad
        assert mine.grad is None


def test_threads_do_not_change_a_bit() -> None:
    device, threads, results = torch.device("cpu"), torch.get_num_threads(), []
    for target_dtype, source_dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16)):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                targets, sources = make(device, target_dtype, source_dtype, [(100_001,), (3,), (65_537,), (77, 999)])
                ema_update_(targets, sources, momentum=0.99)
                results.append(targets)
        finally:
            torch.set_num_threads(threads)
        assert_equal(results[-1], results[-2])
        assert_equal(results[-1], results[-3])


def test_opcheck(device: torch.device) -> None:
    targets, sources = make(device, shapes=[(3,), (), (4, 5)])
    for momentum in (None, torch.tensor(0.9, device=device)):
        torch.library.opcheck(torch.ops.sslfast.ema_update_.default, (clones(targets), sources, momentum, 0.5))


def test_compile(device: torch.device) -> None:
    targets, sources = make(device, shapes=[(3,), (), (4, 5)])
    for momentum in (0.9, torch.tensor(0.9, device=device)):
        expected = clones(targets)
        ema_update_(expected, sources, momentum=momentum)
        torch.compile(ema_update_, fullgraph=True, backend="aot_eager")(targets, sources, momentum=momentum)
        assert_equal(targets, expected)


def test_bad_arguments() -> None:
    targets, sources = make(torch.device("cpu"), shapes=[(3,), (4, 5)])
    before = clones(targets)
    with pytest.raises(ValueError, match=r"ema_update_: momentum must be in \[0, 1\], got momentum=1.5"):
        ema_update_(targets, sources, momentum=1.5)
    with pytest.raises(RuntimeError, match=r"momentum must be in \[0, 1\], got a tensor of 1.5"):
        ema_update_(targets, sources, momentum=torch.tensor(1.5))
    with pytest.raises(RuntimeError, match=r"momentum must be .* 0-d fp32 or fp64 tensor, got Long of shape \[1\]"):
        ema_update_(targets, sources, momentum=torch.tensor([1]))
    with pytest.raises(
        ValueError, match=r"as many sources as targets are needed, got len\(targets\)=2, len\(sources\)=1"
    ):
        ema_update_(targets, sources[:1], momentum=0.5)
    with pytest.raises(RuntimeError, match=r"sources\[1\] must have shape \[4, 5\] as targets\[1\], got \[5, 4\]"):
        ema_update_(targets, [sources[0], sources[1].t()], momentum=0.5)
    with pytest.raises(RuntimeError, match=r"targets\[1\] must be fp32, .* got Long; .* copy them with target.copy_"):
        ema_update_([targets[0], torch.tensor(3)], [sources[0], torch.tensor(4)], momentum=0.5)
    with pytest.raises(RuntimeError, match=r"sources\[0\] must be fp32, fp64, bf16 or fp16, got Int"):
        ema_update_(targets[:1], [sources[0].int()], momentum=0.5)
    with pytest.raises(RuntimeError, match=r"targets\[0\] is expanded or overlaps itself, .* pass a .clone\(\)"):
        ema_update_([torch.zeros(1).expand(3)], sources[:1], momentum=0.5)
    assert_equal(targets, before)


def test_tied_targets() -> None:
    weights = torch.zeros(10)
    expected = r"targets\[{}\] and targets\[{}\] share memory; pass tied weights once"
    with pytest.raises(RuntimeError, match=expected.format("0", "1")):
        ema_update_([weights, weights], [torch.ones(10)] * 2, momentum=0.5)
    with pytest.raises(RuntimeError, match=expected.format("0", "1")):
        ema_update_([weights[5:], weights[:6]], [torch.ones(5), torch.ones(6)], momentum=0.5)
    ema_update_([weights[5:], weights[:5]], [torch.ones(5)] * 2, momentum=0.5)
    assert weights.tolist() == [0.5] * 10


def test_sources_in_the_memory_of_other_targets() -> None:
    weights = torch.zeros(10)
    with pytest.raises(RuntimeError, match=r"sources\[0\] and targets\[0\] share memory; pass a .clone\(\)"):
        ema_update_([weights[1:]], [weights[:-1]], momentum=0.5)
    with pytest.raises(RuntimeError, match=r"sources\[1\] and targets\[0\] share memory"):
        ema_update_([weights[:5], weights[5:]], [torch.ones(5), weights[:5]], momentum=0.5)
    columns = torch.zeros(3, 4)
    columns[:, 2:] = 1
    ema_update_([columns[:, :2]], [columns[:, 2:]], momentum=0.5)  # interleaved, nothing shared
    assert columns.tolist() == [[0.5, 0.5, 1, 1]] * 3


def test_target_that_overlaps_itself() -> None:
    windows = torch.arange(6.0).unfold(0, 3, 1)
    with pytest.raises(
        RuntimeError, match=r"targets\[0\] is expanded or overlaps itself, several of its elements share"
    ):
        ema_update_([windows], [torch.ones(4, 3)], momentum=0.5)


def test_wrong_device() -> None:
    targets, sources = make(torch.device("cpu"), shapes=[(3,), (4, 5)])
    with pytest.raises(ValueError, match=r"ema_update_: sources\[1\] is on meta and targets\[0\] on cpu"):
        ema_update_(targets, [sources[0], sources[1].to("meta")], momentum=0.5)
    with pytest.raises(ValueError, match=r"momentum is on meta and targets\[0\] on cpu"):
        ema_update_(targets, sources, momentum=torch.tensor(0.5, device="meta"))
