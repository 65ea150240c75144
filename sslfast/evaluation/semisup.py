"""Semi-supervised learning: the whole network is fine-tuned on few labelled images, protocol ``semisup-...``.

A linear classifier on the pooled features, 70 epochs of SGD with Nesterov momentum, learning rate 0.01 per 256 images,
divided by 10 at epoch 30, no weight decay, random resized crops and flips; BatchNorm trains too. The published
numbers (PIRL section 4.3) are top-5 on ImageNet with 1 % and 10 % of the labels.
"""

import copy
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.config import to_dict
from sslfast.data import Manifest
from sslfast.device import resolve_precision
from sslfast.distributed import distributed_device, mean_over_ranks, replicate
from sslfast.evaluation.config import ImageConfig, check_at_least, check_seeds
from sslfast.evaluation.encoders import TRAINED, TrunkEncoder, load_run, trunk_encoders
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.folders import drawn_rows, listed_rows, load_manifests
from sslfast.evaluation.results import accuracy_row, data_facts, evaluation_folder, run_facts, write_result
from sslfast.evaluation.sgd import SEMISUP, ResumeState, TrainingImages, check_finite, count_hits
from sslfast.evaluation.table import layer_table
from sslfast.models import seeded
from sslfast.optim import set_learning_rate
from sslfast.runs import versions

LOWER = "lower --batch-size, and the learning rate with it, or name other weights as RUN"


@dataclass(frozen=True, kw_only=True)
class SemisupConfig(ImageConfig):
    """Settings of :func:`evaluate_semisup`."""

    fraction: float = 0.01
    """Share of train that is used, the same of every class, drawn by seed; at least one image of each."""
    subset: Path | None = None
    """File that lists the images to use instead, one name a line (SimCLR's lists for ImageNet)."""
    encoders: tuple[str, ...] = (TRAINED,)
    """trained, untrained (supervised learning from scratch on the same images) or both."""
    epochs: int = SEMISUP.epochs
    """Passes over the subset; the learning rate's drop scales with it."""
    seeds: tuple[int, ...] = (0,)
    """Of the drawn subset, the initial classifier, order and crops. Several: mean and standard deviation."""
    batch_size: int = 256
    """Images per step; the learning rate scales with it."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Of the network."""
    workers: int = 0
    """Decoding threads, and processes where images are augmented; 0: decode in the main thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, epochs=self.epochs)
        check_seeds(self.seeds)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}")


class FineTuned(nn.Module):
    """A linear classifier on a copy of a trunk.

    Args:
        encoder: provides trunk and normalisation; not modified.
        classes: columns of the classifier.
        seed: of its initial weights, normal with deviation 0.01; biases are 0.
    """

    def __init__(self, encoder: TrunkEncoder, *, classes: int, seed: int) -> None:
        super().__init__()
        self.prepare = encoder.prepare
        self.trunk = copy.deepcopy(encoder.trunk)
        width = self.trunk.out_features
        assert isinstance(width, int)
        with seeded(seed):
            self.classifier = nn.Linear(width, classes)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of uint8 images."""
        return self.classifier(self.trunk(self.prepare(images)))


def fine_tune(
    model: FineTuned,
    images: TrainingImages,
    *,
    epochs: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    resume: ResumeState,
) -> None:
    """Train all weights. Gradients are averaged over ranks; BatchNorm normalises each rank's part of the batch."""
    model.train()
    optimizer = SEMISUP.optimizer(model, batch_size=batch_size)
    start = resume.load(model, optimizer)
    replica = replicate(model, device)
    for epoch in range(start, epochs):
        set_learning_rate(optimizer, SEMISUP.learning_rate(epoch, epochs=epochs, batch_size=batch_size))
        loss = torch.zeros(())
        for crops, labels in images.epoch(epoch):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = replica(crops)
            loss = cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check_finite({"the classifier": loss.detach()}, epoch, remedy=LOWER)
        resume.save(model, optimizer, epoch + 1)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean_over_ranks(buffer))
    model.eval()


def evaluate_semisup(
    run: Path, data: Path, config: SemisupConfig = SemisupConfig(), *, output: Path | None = None
) -> dict[str, Any]:
    """Accuracy of a run's encoder after fine-tuning on a part of the labels.

    Args:
        run: run directory, or a file of weights (a checkpoint, sslfast export, VISSL, PyContrast, MoCo), whose
            results go to FILE.evaluation in place of RUN/evaluation.
        data: folder with train/<class>/ and val/<class>/.
        config: settings.
        output: JSON file to write; default: RUN/evaluation/semisup-1%.json (or the list's name).

    A stopped evaluation resumes after the last complete epoch.
    """
    part = f"{100 * config.fraction:g}%" if config.subset is None else config.subset.stem
    path = output or evaluation_folder(run) / f"semisup-{part}.json"
    with distributed_device(config.device) as device:
        train, val = load_manifests(data, on_bad_image=config.on_bad_image, decoding=config.decoding(run))
        subsets = {seed: _subset(train, config, seed) for seed in config.seeds}
        loaded = load_run(run)
        encoders = trunk_encoders(loaded, config.encoders)
        size = loaded.size if config.size is None else config.size
        reader = ImageReader(val, size, config.batch_size, config.workers, config.on_bad_image)
        precision = resolve_precision(config.precision, device)
        facts = {
            **run_facts(run, loaded, size),
            **SEMISUP.facts(config.epochs, config.batch_size),
            "precision": str(precision).removeprefix("torch."),
            "subset": {
                "fraction": config.fraction if config.subset is None else None,
                "file": None if config.subset is None else str(config.subset),
                "images": [len(subset) for subset in subsets.values()],
                "digests": [subset.digest() for subset in subsets.values()],
            },
            "seeds": list(config.seeds),
            "source": SEMISUP.source,
        }
        labels = torch.from_numpy(val.labels)
        name = f"{SEMISUP.full_name(config.epochs)}-{part}"
        rows, count, states = [], 0, []
        for encoder_name, encoder in encoders.items():
            encoder.to(device)
            pairs = []
            for seed, subset in subsets.items():
                resume = ResumeState(
                    path.with_name(f"{path.stem}-{encoder_name}-seed{seed}.partial.pt"),
                    {
                        **facts,
                        "subset": subset.digest(),
                        "seeds": seed,
                        "encoder": encoder_name,
                        "decoding": asdict(config.decoding(run)),
                    },
                )
                states.append(resume)
                model = FineTuned(encoder, classes=len(train.classes), seed=seed).to(device)
                images = TrainingImages(
                    subset,
                    size=size,
                    batch_size=config.batch_size,
                    seed=seed,
                    workers=config.workers,
                    on_bad_image=config.on_bad_image,
                    device=device,
                )
                with closing(images):
                    fine_tune(
                        model,
                        images,
                        epochs=config.epochs,
                        batch_size=config.batch_size,
                        device=device,
                        precision=precision,
                        resume=resume,
                    )
                found, count = count_hits(lambda x, model=model: {"": model(x)}, [""], reader, labels, device)
                pairs.append(found[""])
            rows.append({"encoder": encoder_name, "protocol": name, **accuracy_row(pairs, count)})
        result = {
            "protocol": name,
            "config": to_dict(config),
            "results": rows,
            **facts,
            "data": data_facts(data, (train, val), [len(subsets[config.seeds[0]]), count]),
            "versions": versions(),
        }
        result["data"]["train"]["left_out"] = len(train.excluded)
        write_result(result, path)
        for resume in states:
            resume.remove()
        return result


def _subset(train: Manifest, config: SemisupConfig, seed: int) -> Manifest:
    if config.subset is not None:
        return train.take(listed_rows(train, config.subset))
    return train.take(drawn_rows(train, config.fraction, seed=seed))


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return layer_table(result)
