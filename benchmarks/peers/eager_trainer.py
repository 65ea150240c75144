"""PIRL with jigsaw as a plain PyTorch trainer: PIL, DataLoader, eager InfoNCE on gathered bank rows, all in fp32.

From the paper's recipe (sections 3 and 4) on torch and torchvision alone: each image is decoded and cropped twice by
torchvision's transforms in worker processes, colour jitter and grayscale run there on every patch, the bank rows of
every sample are gathered into ``[B, K + 1, D]``, and the bank is updated by index. No autocast, no channels_last.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2

from sslfast.bench.peers import gather_infonce, scatter_update_

_NORMALISE = [
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


class JigsawImages(Dataset[tuple[int, Tensor, Tensor]]):
    """Samples ``(sample id, image [3, 224, 224], patches [9, 3, 64, 64] in random order)``."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        colour = [v2.ColorJitter(0.4, 0.4, 0.4, 0.4), v2.RandomGrayscale(0.2)]
        self.image = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *colour, *_NORMALISE])
        self.square = v2.RandomResizedCrop(255, scale=(0.6, 1.0))
        self.patch = v2.Compose([v2.RandomCrop(64), *colour, *_NORMALISE])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, sample_id: int) -> tuple[int, Tensor, Tensor]:
        picture = Image.open(self.files[sample_id]).convert("RGB")
        square = self.square(picture)
        cells = [square.crop((85 * x, 85 * y, 85 * x + 85, 85 * y + 85)) for y in range(3) for x in range(3)]
        random.shuffle(cells)
        return sample_id, self.image(picture), torch.stack([self.patch(cell) for cell in cells])


class EagerPIRL(nn.Module):
    """Trunk, two heads, bank and loss (InfoNCE against ``num_negatives`` bank rows drawn for each sample)."""

    def __init__(self, name: str, num_rows: int, *, num_negatives: int, temperature: float = 0.07) -> None:
        super().__init__()
        net = getattr(models, name)(weights=None)
        columns = net.fc.in_features
        net.fc = nn.Identity()
        self.trunk, self.image_head, self.patch_head = net, nn.Linear(columns, 128), nn.Linear(columns, 128)
        self.combine = nn.Linear(9 * 128, 128)
        self.num_negatives, self.temperature = num_negatives, temperature
        self.register_buffer("bank", normalize(torch.randn(num_rows, 128), dim=1))

    def forward(self, sample_ids: Tensor, image: Tensor, patches: Tensor) -> Tensor:
        patch = self.patch_head(self.trunk(patches.flatten(0, 1))).unflatten(0, patches.shape[:2]).flatten(1)
        patch = normalize(self.combine(patch), dim=1)
        image = normalize(self.image_head(self.trunk(image)), dim=1)
        self.latest = (sample_ids, image.detach())
        negatives = torch.randint(len(self.bank), (len(image), self.num_negatives), device=image.device)
        # One gather per view, as VISSL and PyContrast do.
        losses = [
            gather_infonce(view[None], self.bank, sample_ids, negatives, temperature=self.temperature)
            for view in (patch, image)
        ]
        return 0.5 * losses[0].mean() + 0.5 * losses[1].mean()

    @torch.no_grad()
    def update_bank(self) -> None:
        sample_ids, features = self.latest
        scatter_update_(self.bank, sample_ids, features, momentum=0.5)


def eager_steps(
    files: list[Path], name: str, *, batch_size: int, num_negatives: int, workers: int, device: torch.device
) -> Iterator[float]:
    """Train endlessly; yields the loss of every step, read from the device as most loops do."""
    loader = DataLoader(
        JigsawImages(files),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    model = EagerPIRL(name, len(files), num_negatives=num_negatives).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    while True:
        for sample_ids, image, patches in loader:
            optimizer.zero_grad()
            loss = model(sample_ids.to(device), image.to(device), patches.to(device))
            loss.backward()
            optimizer.step()
            model.update_bank()
            yield loss.item()
