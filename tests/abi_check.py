"""Runs the core beside the Python and torch of the interpreter at hand: `python tests/abi_check.py`.

The package is the installed one, or that of this checkout where none is. The core is built once, against one torch; the
stable ABI promises that it runs on every torch from 2.10 on, and it uses nothing of Python. This file needs torch alone
(no pytest), so that an environment with another torch stays small; `--pretrain` (of images, by worker processes that
forkserver starts, as Python 3.14 does) needs the `train` extra.
"""

import importlib.util
import itertools
import multiprocessing
import sys
import tempfile
from pathlib import Path

if importlib.util.find_spec("sslfast") is None:  # not installed: this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import normalize

from sslfast import ops
from sslfast.ops.view_parameters import ViewParameter, neutral_parameters


def main() -> None:
    """Every op against its reference, through the dispatcher, autograd and torch.library.opcheck."""
    torch.manual_seed(0)
    bank, index = normalize(torch.randn(90, 24), dim=1), torch.tensor([4, 4, 80])
    query = normalize(torch.randn(2, 3, 24), dim=-1).requires_grad_()
    passed = 0

    options = {"num_negatives": 19, "z": 200.0}
    for loss, negatives in itertools.product(("infonce", "nce"), ("sampled", "shared", "full")):
        value = ops.bank_nce(query, bank, index, negatives=negatives, loss=loss, **options)
        expected = ops.bank_nce_reference(query, bank, index, negatives=negatives, loss=loss, **options)
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(x.sum(), query)[0] for x in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)  # gradients reach 1 / temperature
        passed += 1

    draw = {"num_negatives": 19, "num_rows": 90, "seed": 1, "step": 2}
    assert torch.equal(ops.negative_rows(index, **draw), ops.negative_rows_reference(index, **draw))

    ours, theirs = bank.clone(), bank.clone()
    ops.bank_update_(ours, index, query[0])
    ops.bank_update_reference(theirs, index, query[0])
    torch.testing.assert_close(ours, theirs)

    rings = [(bank.clone(), torch.tensor(88)) for _ in range(2)]
    ops.bank_enqueue_(*rings[0], query[0])
    ops.bank_enqueue_reference(*rings[1], query[0])
    assert torch.equal(rings[0][0], rings[1][0])
    assert rings[0][1] == 1
    encoders = [[bank.clone(), bank[:3, :1].clone(), query[1].detach().double()] for _ in range(2)]
    sources = [bank.flip(0).bfloat16(), bank[5:8, :1], query[0]]
    for momentum in (0.9, torch.tensor(0.2)):
        ops.ema_update_(encoders[0], sources, momentum=momentum)
        ops.ema_update_reference(encoders[1], sources, momentum=momentum)
    for mine, other in zip(*encoders, strict=True):
        torch.testing.assert_close(mine, other)

    images = torch.randint(256, (3, 3, 31, 31), dtype=torch.uint8)
    turns = torch.tensor([1, 2, 3])
    assert torch.equal(ops.rotate90(images, turns), ops.rotate90_reference(images, turns))
    order, offsets = torch.rand(3, 9).argsort(1), torch.randint(3, (3, 9, 2))
    patches = ops.jigsaw_patches(images, order, offsets, patch_size=8)
    assert torch.equal(patches, ops.jigsaw_patches_reference(images, order, offsets, patch_size=8))
    numbers = torch.tensor(neutral_parameters())
    numbers[[ViewParameter.FLIP, ViewParameter.JITTER, ViewParameter.JITTER_ORDER]] = torch.tensor([1.0, 1, 17])
    numbers[[ViewParameter.BRIGHTNESS, ViewParameter.CONTRAST, ViewParameter.SATURATION]] = torch.tensor(
        [0.7, 1.2, 1.3]
    )
    numbers[[ViewParameter.HUE, ViewParameter.BLUR_SIGMA]] = torch.tensor([0.2, 0.8])
    numbers = numbers.repeat(3, 9, 1)
    views = {"quarter_turns": turns, "permutation": order, "offsets": offsets, "patch_size": 8}
    rendered = ops.render_views(images, numbers, **views)
    torch.testing.assert_close(rendered, ops.render_views_reference(images, numbers, **views), rtol=0, atol=1e-4)
    lab = ops.rgb_to_lab(images / 255)
    torch.testing.assert_close(lab, ops.rgb_to_lab_reference(images / 255), rtol=0, atol=1e-3)
    arguments = (30, 5, 11)
    orders = ops.permutations.max_hamming_permutations(*arguments)
    assert torch.equal(orders, ops.permutations.max_hamming_permutations_reference(*arguments))
    passed += 9

    torch.library.opcheck(torch.ops.sslfast.negative_rows.default, (index, None, 2, 19, 90, 1, True, False))
    torch.library.opcheck(torch.ops.sslfast.bank_update_.default, (bank, index, query[0].detach(), 0.5))
    torch.library.opcheck(torch.ops.sslfast.bank_enqueue_.default, (*rings[0], query[0].detach()))
    lists = (encoders[0], [source.detach() for source in sources])
    torch.library.opcheck(torch.ops.sslfast.ema_update_.default, (*lists, None, 0.9))
    passed += 4

    version, built = sys.version.split()[0], ops.build_info()["note"]
    print(
        f"binary ABI beside Python {version} and torch {torch.__version__} ({built}), {Path(ops.__file__).parents[1]}"
    )
    print(f"{passed} passed, 0 failed")


def pretrain() -> None:
    """A run of two steps on images in files."""
    from PIL import Image

    import sslfast

    multiprocessing.set_start_method("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        for number, pixels in enumerate(torch.randint(256, (16, 40, 48, 3), dtype=torch.uint8)):
            Image.fromarray(pixels.numpy()).save(f"{folder}/data/{number}.png")
        small = {"model.name": "resnet18", "model.width": 0.125, "method.num_negatives": 8}
        small |= {"method.image_view.crop.size": 32, "loader.workers": 2}
        result = sslfast.pretrain(f"{folder}/data", "npid-small", f"{folder}/run", epochs=1, batch_size=8, **small)
    print(f"pretrained: {result}")


if __name__ == "__main__":
    main()
    if "--pretrain" in sys.argv[1:]:
        pretrain()
