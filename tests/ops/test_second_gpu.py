"""Ops on a GPU that is not the current one. On machines with fewer than two GPUs this file has no tests."""

import torch
from torch.nn.functional import normalize

from sslfast import ops

if torch.cuda.device_count() >= 2:

    def test_ops_on_the_second_cuda_device() -> None:
        generator = torch.Generator().manual_seed(0)
        bank = normalize(torch.randn(1700, 128, generator=generator), dim=1)
        query = normalize(torch.randn(2, 70, 128, generator=generator), dim=-1)
        index = torch.randperm(1700, generator=generator)[:70]
        crops = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
        parameters = torch.tensor(ops.neutral_parameters()).expand(2, 1, -1).contiguous()
        second = torch.device("cuda:1")
        with torch.cuda.device(0):
            for dtype in (torch.float32, torch.bfloat16):
                for mode in ("sampled", "shared", "full"):
                    ours = ops.bank_nce(
                        query.to(second), bank.to(second, dtype), index.to(second), negatives=mode, num_negatives=64
                    )  # type: ignore[call-overload]
                    theirs = ops.bank_nce_reference(query, bank.to(dtype), index, negatives=mode, num_negatives=64)
                    assert ours.device == second
                    torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-2, atol=2e-2)
            moved, expected = bank.to(second), bank.clone()
            ops.bank_update_(moved, index.to(second), query[0].to(second))
            ops.bank_update_reference(expected, index, query[0])
            torch.testing.assert_close(moved.cpu(), expected)
            head = torch.tensor(1690, device=second)
            ops.bank_enqueue_(moved, head, query[0].to(second))
            assert head.item() == (1690 + 70) % 1700
            views = ops.render_views(crops.to(second), parameters.to(second))
            torch.testing.assert_close(views.cpu(), ops.render_views(crops, parameters), rtol=0, atol=1e-3)
