"""Ops without the compiled core: one warning, and the results of the references."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sslfast.ops import _core
from tests.ops.test_sanitizers import ROOT, link_tree

CODE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sslfast.ops as ops
    import sslfast.ops.bank_nce
print(*[f"{w.category.__name__}: {w.message}" for w in caught if "sslfast" in str(w.message)], sep="\\n")
assert not ops.is_compiled()
import torch
from torch.nn.functional import normalize
from tests import abi_check

abi_check.main()

bank, index = normalize(torch.randn(40, 8, dtype=torch.float64), dim=1), torch.tensor([3, 3, 39])
query = normalize(torch.randn(3, 8, dtype=torch.float64), dim=1).requires_grad_()
for loss, negatives in (("infonce", "sampled"), ("nce", "full"), ("nce", "sampled"), ("infonce", "shared")):
    options = {"num_negatives": 9, "loss": loss, "negatives": negatives, "z": 90.0}
    assert torch.autograd.gradcheck(lambda q: ops.bank_nce(q, bank, index, **options), query)
    compiled = torch.compile(ops.bank_nce, fullgraph=True, backend="aot_eager")
    values = [function(query, bank, index, **options) for function in (ops.bank_nce, compiled)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(value.sum(), query)[0] for value in values])

images = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
turns, order, offsets = torch.tensor([1, 6]), torch.rand(2, 9).argsort(1), torch.zeros(2, 9, 2, dtype=torch.int64)
assert torch.autograd.gradcheck(lambda x: ops.rotate90(x, turns), images)
assert torch.autograd.gradcheck(lambda x: ops.jigsaw_patches(x, order, offsets, patch_size=2), images)

ours = bank.clone()
torch.compile(ops.bank_update_, fullgraph=True, backend="aot_eager")(ours, index, query.detach())
ops.bank_update_reference(bank, index, query.detach())
torch.testing.assert_close(ours, bank)

used = torch.nn.Parameter(bank.clone())
saved = used * used
ops.ema_update_([used], [bank], momentum=0.5)  # what autograd saved has changed: an error, as with the kernels
wrong = torch.tensor([0, 40, 1])
for call in (
    lambda: saved.sum().backward(),
    lambda: ops.bank_nce(query, bank, wrong, num_negatives=4),
    lambda: ops.bank_nce(query, bank, index[:1], num_negatives=4),
    lambda: ops.bank_update_(bank, wrong, query.detach()),
    lambda: ops.bank_enqueue_(bank, torch.tensor(40), query.detach()),
    lambda: ops.negative_rows(-wrong, num_negatives=2, num_rows=40, seed=0, step=0),
    lambda: ops.jigsaw_patches(images, order + 1, offsets, patch_size=2),
    lambda: ops.jigsaw_patches(images, order, offsets + 1, patch_size=2),
    lambda: ops.bank_nce(query, bank, index.int(), num_negatives=4),
    lambda: ops.bank_nce(query[:, :1], bank, index, num_negatives=4),  # would be broadcast
    lambda: ops.bank_nce(query, bank.float(), index, num_negatives=4),
    lambda: ops.bank_nce(query, bank.int(), index, num_negatives=4),
    lambda: ops.bank_nce(query, bank, index, num_negatives=4, step=torch.tensor(1.5)),
    lambda: ops.bank_nce(query, bank, index, num_negatives=4, loss="nce", z=torch.ones(1)),
    lambda: ops.bank_update_(bank, index, query.detach()[:, :1]),
    lambda: ops.bank_update_(bank.T, index, query.detach()),
    lambda: ops.bank_update_(bank, index, bank[:3]),
    lambda: ops.bank_enqueue_(bank, torch.tensor(0), query.detach()[:, :1]),
    lambda: ops.ema_update_([bank, bank], [bank, bank], momentum=0.5),
    lambda: ops.ema_update_([bank], [bank], momentum=torch.tensor(2.0)),
    lambda: ops.rgb_to_lab(images[:, :1].detach()),
    lambda: ops.rgb_to_lab(images.detach().byte()),
    lambda: ops.render_views(images.detach(), torch.zeros(2, 1, 14)),
    lambda: ops.render_views(images.detach().byte(), torch.zeros(2, 1, 14, dtype=torch.float64)),
    lambda: ops.render_views(images.detach().byte(), torch.full((2, 1, 14), 9.0)),
    lambda: torch.ops.sslfast.bank_update_(torch._neg_view(bank), index, query.detach(), 0.5),
):
    try:
        call()
    except RuntimeError as error:
        print("error:", str(error).splitlines()[0])
    else:
        raise AssertionError("no error")
"""


def test_without_the_core(tmp_path: Path) -> None:
    link_tree(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert re.match(
        r"RuntimeWarning: sslfast's compiled core is not installed \(.*_C\.so is missing\): its ops run as their "
        r"references in torch, slower and with more memory; install a wheel, or build it",
        first,
    )
    assert "no compiled core" in lines[0]
    assert lines[1] == "19 passed, 0 failed"
    errors = [line.removeprefix("error: ") for line in lines[2:]]
    assert len(errors) == 26
    assert errors[1:] == [
        "bank_nce: index must be in [0, 40)",
        "bank_nce: index must have shape [3], got [1]",
        "bank_update_: index must be in [-1, 40)",
        "bank_enqueue_: head must be in [0, 40)",
        "negative_rows: index must be in [0, 40)",
        "jigsaw_patches: permutation must be in [0, 9)",
        "jigsaw_patches: offsets must be in [0, 1)",
        "bank_nce: index must be int64; convert it with .long(), got torch.int32",
        "bank_nce: query must have D=8 columns like bank, got 1",
        "bank_nce: query must be fp32; convert it with .float(), got torch.float64",
        "bank_nce: bank must be fp32, fp64, bf16 or fp16, got torch.int32",
        "bank_nce: step must be an int or a 0-d int64 tensor, got (torch.float32, [])",
        "bank_nce: z must be a float or a 0-d fp64 tensor, got (torch.float64, [1])",
        "bank_update_: features must have shape [B, D] = [3, 8], got [3, 1]",
        "bank_update_: bank must be contiguous, it is updated in place; build it with .contiguous(), got [8, 40] with "
        "strides [1, 8]",
        "bank_update_: features must not share memory with bank",
        "bank_enqueue_: keys must have shape [B, D] = [B, 8], got [3, 1]",
        "ema_update_: two targets share memory; pass tied weights once",
        "ema_update_: momentum must be in [0, 1]",
        "rgb_to_lab: pixels must have shape [N, 3, H, W], got [2, 1, 6, 6]",
        "rgb_to_lab: pixels must be fp32, fp64, bf16 or fp16, got torch.uint8",
        "render_views: crops must be uint8",
        "render_views: parameters must be fp32 [B, M, 14] = [2, 1, 14], got torch.float64 [2, 1, 14]",
        "render_views: hue must be in [-1, 1]",
        "bank_update_: a tensor is lazily negated; pass a copy, tensor.resolve_neg()",
    ]
    assert "modified by an inplace operation" in errors[0]


def test_a_core_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    """A damaged or foreign library is not a missing one: it says so, with the reason."""
    link_tree(tmp_path)
    (tmp_path / "sslfast" / "_C.so").write_bytes(b"\x7fELF")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import sslfast.ops"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert re.match(r"ImportError: sslfast's compiled core does not load with torch .*: .*; install a wheel", message)


def test_schemas_are_those_of_the_core() -> None:
    written = (ROOT / "csrc" / "library.cpp").read_text()
    names = [schema.split("(")[0] for schema in _core.SCHEMAS]
    assert sorted(names) == sorted(re.findall(r'"(\w+)\(Tensor', written))
    for name, schema in zip(names, _core.SCHEMAS, strict=True):
        compiled = getattr(torch.ops.sslfast, name).default._schema
        assert str(torch._C.parse_schema(f"sslfast::{schema}")) == str(compiled)


def test_the_core_is_loaded_without_a_warning() -> None:
    assert _core.is_compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _core._load()[0] is not None


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize(("cells", "seed"), [(5, 0), (5, 2**62), (9, 3)])
def test_permutations_are_those_of_the_reference(count: int, cells: int, seed: int) -> None:
    from sslfast.ops import permutations

    expected = permutations.max_hamming_permutations_reference(count, cells, seed)
    assert torch.equal(permutations.max_hamming_permutations(count, cells, seed), expected)
