"""MoCo as lightly's documentation writes it, with sslfast's loss: only the import of ``NTXentLoss`` differs.

    python examples/lightly_on_our_bank.py FOLDER [EPOCHS]

The loss streams over the queue of 4,096 keys and never forms the matrix of scores; its queue is part of ``state_dict``.
"""

import copy
import sys

import torch
from lightly.data import LightlyDataset
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from torch import nn
from torchvision.models import resnet18

from sslfast.adapters import NTXentLoss  # instead of lightly.loss.NTXentLoss


class MoCo(nn.Module):
    """A trained encoder for queries, a moving average of it for keys."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        self.projection_head = MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(images).flatten(start_dim=1))

    @torch.no_grad()
    def forward_momentum(self, images: torch.Tensor) -> torch.Tensor:
        return self.projection_head_momentum(self.backbone_momentum(images).flatten(start_dim=1))


def main(folder: str, epochs: int = 1) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = LightlyDataset(folder, transform=MoCoV2Transform(input_size=32))
    batches = torch.utils.data.DataLoader(data, batch_size=min(64, len(data)), shuffle=True, drop_last=True)
    model = MoCo().to(device)
    criterion = NTXentLoss(memory_bank_size=(4096, 128)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for views, _labels, _names in batches:
            update_momentum(model.backbone, model.backbone_momentum, m=0.99)
            update_momentum(model.projection_head, model.projection_head_momentum, m=0.99)
            query, key = (view.to(device) for view in views)
            loss = criterion(model(query), model.forward_momentum(key))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
    return total / len(batches)


if __name__ == "__main__":
    print(f"loss: {main(sys.argv[1], *map(int, sys.argv[2:])):.3f}")
