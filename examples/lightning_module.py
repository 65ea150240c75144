"""NPID as a Lightning module on sslfast's loader, view stage and memory bank.

python examples/lightning_module.py FOLDER [EPOCHS]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, IterableDataset

from sslfast.data import Manifest, open_data
from sslfast.loaders import LoaderConfig, build_loader
from sslfast.models import MemoryBank, ResNetConfig, build_trunk
from sslfast.ops import bank_nce
from sslfast.views import Batch, CropConfig, ViewConfig, ViewStage

VIEWS = {"image": ViewConfig(crop=CropConfig(size=64))}


class Epochs(IterableDataset[Batch]):
    """sslfast's loader as a data set whose items are whole batches; every pass is the next epoch."""

    def __init__(self, manifest: Manifest, batch_size: int) -> None:
        self.loader = build_loader(
            LoaderConfig(workers=2), views=VIEWS, batch_size=batch_size, seed=0, manifest=manifest
        )
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.passes = self.passes, self.passes + 1
        yield from self.loader.epoch(epoch)

    def __len__(self) -> int:
        return self.loader.steps_per_epoch


class InstanceDiscrimination(lightning.LightningModule):
    """A trunk, a linear projection, and one bank row per image."""

    def __init__(self, num_images: int) -> None:
        super().__init__()
        self.trunk = build_trunk(ResNetConfig(name="resnet18", stem="small", width=0.25), seed=0)
        self.projection = nn.Linear(self.trunk.out_features, 128)
        self.bank = MemoryBank(num_images, 128, momentum=0.5, seed=0)
        self.stage = ViewStage(VIEWS, seed=0)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        crops = {name: crop.to(device) for name, crop in batch.crops.items()}
        return Batch(sample_ids=batch.sample_ids.to(device), crops=crops, epoch=batch.epoch)

    def training_step(self, batch: Batch, step: int) -> torch.Tensor:
        pixels = self.stage(batch)["image"].pixels
        query = normalize(self.projection(self.trunk(pixels)), dim=1)
        loss = bank_nce(query, self.bank.vectors, batch.sample_ids, num_negatives=4096, step=self.global_step).mean()
        self.embeddings = batch.sample_ids, query.detach()
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.sample_ids))
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.bank.update_(*self.embeddings)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def main(folder: str, epochs: int = 1) -> float:
    manifest = open_data(Path(folder))
    batches = DataLoader(Epochs(manifest, batch_size=min(64, len(manifest))), batch_size=None)
    module = InstanceDiscrimination(len(manifest))
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1
    )
    trainer.fit(module, batches)
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    print(f"loss: {main(sys.argv[1], *map(int, sys.argv[2:])):.3f}")
