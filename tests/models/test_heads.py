from typing import Any

import pytest
import torch
from torch import nn

from sslfast.models.heads import MLPHead


def described(head: nn.Module) -> list[str]:
    names = []
    for module in head.children():
        name = type(module).__name__
        if isinstance(module, nn.Linear):
            name += f" {module.in_features}-{module.out_features}" + (" bias" if module.bias is not None else "")
        if isinstance(module, nn.BatchNorm1d):
            name += f" {module.num_features}" + (" affine" if module.affine else "")
        names.append(name)
    return names


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["Linear 8-6 bias", "ReLU", "Linear 6-4 bias"]),
        ({"layers": 1}, ["Linear 8-4 bias"]),
        (  # BYOL
            {"hidden_norm": True, "output_bias": False},
            ["Linear 8-6 bias", "BatchNorm1d 6 affine", "ReLU", "Linear 6-4"],
        ),
        (  # SimSiam's projector
            {
                "layers": 3,
                "hidden_norm": True,
                "hidden_bias": False,
                "output_bias": False,
                "output_norm": "plain",
            },
            [
                "Linear 8-6",
                "BatchNorm1d 6 affine",
                "ReLU",
                "Linear 6-6",
                "BatchNorm1d 6 affine",
                "ReLU",
                "Linear 6-4",
                "BatchNorm1d 4",
            ],
        ),
        (  # SimCLR's, as its authors have it
            {"hidden_norm": True, "hidden_bias": False, "output_bias": False, "output_norm": "scale"},
            ["Linear 8-6", "BatchNorm1d 6 affine", "ReLU", "Linear 6-4", "BatchNorm1d 4 affine"],
        ),
        ({"activation": nn.GELU}, ["Linear 8-6 bias", "GELU", "Linear 6-4 bias"]),
    ],
)
def test_layers(options: dict[str, Any], expected: list[str]) -> None:
    assert described(MLPHead(8, 6, 4, **options)) == expected


def test_output_norm() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for norm in ("affine", "scale", "plain"):
        head = MLPHead(8, 6, 4, output_norm=norm)  # type: ignore[arg-type]
        out = head(x)
        torch.testing.assert_close(out.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.std(dim=0, correction=0), torch.ones(4), rtol=0, atol=1e-2)
        learned = [name for name, p in head[3].named_parameters() if p.requires_grad]
        assert learned == {"affine": ["weight", "bias"], "scale": ["weight"], "plain": []}[norm]


def test_names_and_weights_of_earlier_checkpoints() -> None:
    torch.manual_seed(0)
    plain, normed = MLPHead(8, 6, 4), MLPHead(8, 6, 4, hidden_norm=True)
    torch.manual_seed(0)
    earlier = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    byol = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    for head, other in ((plain, earlier), (normed, byol)):
        assert list(head.state_dict()) == list(other.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def test_no_layer() -> None:
    with pytest.raises(ValueError, match="at least 1 layer, got layers=0"):
        MLPHead(8, 6, 4, layers=0)
