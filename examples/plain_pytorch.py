"""Instance discrimination (Wu et al. 2018) in a loop of one's own: torchvision loads, sslfast scores and updates.

python examples/plain_pytorch.py FOLDER [STEPS]        # FOLDER/<class>/*.jpg
"""

import sys

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from sslfast.ops import bank_nce, bank_update_


class WithIndex(ImageFolder):
    """The index of an image is its row of the bank."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(index)[0], index


def main(folder: str, steps: int = 100) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(64, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
            transforms.ToTensor(),
        ]
    )
    data = WithIndex(folder, augment)
    model = resnet18(num_classes=128).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    bank = normalize(torch.randn(len(data), 128, device=device), dim=1)

    step, mean = 0, float("nan")
    while step < steps:
        for images, index in DataLoader(data, batch_size=min(64, len(data)), shuffle=True, drop_last=True):
            images, index = images.to(device), index.to(device)
            query = normalize(model(images), dim=1)
            # 1 positive against 4,096 rows, drawn for every sample from (seed, step, row), never the row itself.
            loss = bank_nce(query, bank, index, temperature=0.07, num_negatives=4096, seed=0, step=step).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            bank_update_(bank, index, query.detach(), momentum=0.5)
            step, mean = step + 1, loss.item()
            if step == steps:
                break
    print(f"loss after {step} steps: {mean:.3f}")
    return mean


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
