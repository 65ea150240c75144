"""Semi-supervised learning: the whole network is fine-tuned on few labelled images, protocol ``semisup-...``.

A linear classifier on the pooled features, 70 epochs of SGD with Nesterov momentum, learning rate 0.01 per 256 images,
divided by 10 at epoch 30, no weight decay, random resized crops and flips; BatchNorm trains too, over 32 images at a
time (``pirl``, on 8 GPUs). ``vissl``: the same with rate 0.05, which VISSL takes on SimCLR's lists. ``simclr``: rate
0.05 per 256 images along a cosine, 60 epochs (1 %) or 30 (10 %) of batches of 4096. The published numbers are top-5 on
ImageNet with 1 % and 10 % of the labels: PIRL's on random images, SimCLR's and VISSL's on SimCLR's class-balanced lists
of 12,811 and 128,116 names, which ``subset`` reads.
"""

import copy
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.config import to_dict
from sslfast.data import Manifest
from sslfast.device import resolve_precision
from sslfast.distributed import distributed_device, mean_over_ranks, no_sync, replicate, world_size
from sslfast.evaluation.config import ImageConfig, check_at_least, check_seeds
from sslfast.evaluation.encoders import TRAINED, TrunkEncoder, load_run, trunk_encoders
from sslfast.evaluation.folders import drawn_rows, listed_rows, load_manifests
from sslfast.evaluation.results import accuracy_row, data_facts, evaluation_folder, run_facts, write_result
from sslfast.evaluation.sgd import (
    SEMISUP,
    SEMISUP_SIMCLR,
    SEMISUP_VISSL,
    ResumeState,
    SGDProtocol,
    TrainingImages,
    check_finite,
    count_hits,
)
from sslfast.evaluation.table import layer_table
from sslfast.models import seeded
from sslfast.optim import set_learning_rate
from sslfast.runs import versions

LOWER = "lower --batch-size, and the learning rate with it, or name other weights as RUN"


@dataclass(frozen=True, kw_only=True)
class SemisupConfig(ImageConfig):
    """Settings of :func:`evaluate_semisup`."""

    protocol: Literal["pirl", "vissl", "simclr"] = "pirl"
    """Whose hyper-parameters. pirl: PIRL's. vissl: the same with rate 0.05, VISSL's for SimCLR's lists. simclr:
    SimCLR's, published with --batch-size 4096."""
    fraction: float = 0.01
    """Share of train that is used, the same of every class, drawn by seed; at least one image of each."""
    subset: Path | None = None
    """File that lists the images to use instead, one name a line: SimCLR's imagenet_subsets/1percent.txt and
    10percent.txt, whose class-balanced images are also VISSL's."""
    encoders: tuple[str, ...] = (TRAINED,)
    """trained, untrained (supervised learning from scratch on the same images) or both."""
    epochs: int | None = None
    """Passes over the subset; default: as published, 70 (pirl, vissl), 60 or, above 5 % of the labels, 30 (simclr). The
    learning rate's drop scales with it."""
    seeds: tuple[int, ...] = (0,)
    """Of the drawn subset, the initial classifier, order and crops. Several: mean and standard deviation."""
    batch_size: int = 256
    """Images per step; the learning rate scales with it."""
    norm_batch: int | None = None
    """Images that BatchNorm normalises together, a divisor of each process's part of the batch; default: as published
    (pirl, vissl: 32; simclr: all of a process), and all of a process where that is no divisor."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Of the network."""
    workers: int = 0
    """Decoding threads, and processes where images are augmented; 0: decode in the main thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, epochs=self.epochs, norm_batch=self.norm_batch)
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
        self.features = encoder.features
        self.trunk = copy.deepcopy(encoder.trunk)
        width = self.trunk.out_features
        assert isinstance(width, int)
        with seeded(seed):
            self.classifier = nn.Linear(width, classes)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of uint8 images."""
        return self.classifier(self.features(self.trunk, images))


def fine_tune(
    model: FineTuned,
    images: TrainingImages,
    protocol: SGDProtocol,
    *,
    epochs: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    resume: ResumeState,
    norm_batch: int | None = None,
) -> None:
    """Train all weights. Gradients are averaged over ranks.

    BatchNorm normalises ``norm_batch`` images together, as processes of so many images would; None: each rank's part of
    the batch. Its running statistics are those of the first part of each rank, as of the first process.
    """
    model.train()
    optimizer = protocol.optimizer(model, batch_size=batch_size)
    start = resume.load(model, optimizer)
    replica = replicate(model, device)
    norms = [norm for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    steps = images.loader.steps_per_epoch
    for epoch in range(start, epochs):
        loss = torch.zeros(())
        for step, (crops, labels) in enumerate(images.epoch(epoch)):
            at = epoch + step / steps if protocol.shape == "cosine" else epoch
            set_learning_rate(optimizer, protocol.learning_rate(at, epochs=epochs, batch_size=batch_size))
            optimizer.zero_grad()
            parts = list(
                zip(crops.split(norm_batch or len(crops)), labels.split(norm_batch or len(crops)), strict=True)
            )
            for number, (some, own) in enumerate(parts):
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = 0.0 if number else momentum
                with nullcontext() if number == len(parts) - 1 else no_sync(replica):
                    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                        logits = replica(some)
                    loss = cross_entropy(logits.float(), own)
                    (loss / len(parts)).backward()
            optimizer.step()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
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
        data: folder with train/<class>/ and val/<class>/, or lists, archives or .beton files of these names.
        config: settings.
        output: JSON file to write; default: RUN/evaluation/semisup-1%.json (or the list's name).

    A stopped evaluation resumes after the last complete epoch.
    """
    part = f"{100 * config.fraction:g}%" if config.subset is None else config.subset.stem
    path = output or evaluation_folder(run) / f"semisup-{part}.json"
    with distributed_device(config.device) as device:
        train, val = load_manifests(data, on_bad_image=config.on_bad_image, decoding=config.decoding(run))
        subsets = {seed: _subset(train, config, seed) for seed in config.seeds}
        protocol = published_protocol(config.protocol, len(subsets[config.seeds[0]]) / len(train))
        epochs = protocol.epochs if config.epochs is None else config.epochs
        norm_batch = norm_images(config, protocol)
        loaded = load_run(run, prefix=config.prefix, patches=config.patches)
        encoders = trunk_encoders(loaded, config.encoders)
        size = loaded.size if config.size is None else config.size
        seen = config.seen(size)
        _, reader = config.readers((train, val), size, seen)
        precision = resolve_precision(config.precision, device)
        facts = {
            **run_facts(run, loaded, size, seen, [reader.chosen]),
            **protocol.facts(epochs, config.batch_size),
            "norm_batch": norm_batch or config.batch_size // world_size(),
            "loader": config.loader,
            "precision": str(precision).removeprefix("torch."),
            "subset": {
                "fraction": config.fraction if config.subset is None else None,
                "file": None if config.subset is None else str(config.subset),
                "images": [len(subset) for subset in subsets.values()],
                "digests": [subset.digest() for subset in subsets.values()],
            },
            "seeds": list(config.seeds),
            "source": protocol.source,
            "departures": protocol.departures(
                epochs,
                config.batch_size,
                seen,
                size=(size, 224),
                norm_batch=(norm_batch, protocol.norm_batch),
            ),
        }
        labels = torch.from_numpy(val.labels)
        name = f"{protocol.full_name(epochs)}-{part}"
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
                    loader=config.loader,
                )
                with closing(images):
                    fine_tune(
                        model,
                        images,
                        protocol,
                        epochs=epochs,
                        batch_size=config.batch_size,
                        device=device,
                        precision=precision,
                        resume=resume,
                        norm_batch=norm_batch,
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


def published_protocol(name: str, share: float) -> SGDProtocol:
    """The protocol of that name for a share of the labels."""
    if name != "simclr":
        return SEMISUP if name == "pirl" else SEMISUP_VISSL
    return replace(SEMISUP_SIMCLR, epochs=30) if share > 0.05 else SEMISUP_SIMCLR


def norm_images(config: SemisupConfig, protocol: SGDProtocol) -> int | None:
    """Images that BatchNorm normalises together; None: all of a process. ValueError where it is no divisor."""
    share = config.batch_size // world_size()
    wanted = config.norm_batch or protocol.norm_batch
    if wanted is None or share == wanted or (config.norm_batch is None and share % wanted):
        return wanted if share == wanted else None
    if share % wanted:
        raise ValueError(f"norm_batch={wanted} must divide each process's {share} images of a batch; give a divisor")
    return wanted


def _subset(train: Manifest, config: SemisupConfig, seed: int) -> Manifest:
    if config.subset is not None:
        return train.take(listed_rows(train, config.subset))
    return train.take(drawn_rows(train, config.fraction, seed=seed))


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return layer_table(result)
