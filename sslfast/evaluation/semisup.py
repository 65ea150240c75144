"""Semi-supervised learning: the whole network is fine-tuned on few labelled images, protocol ``semisup-...``.

A linear classifier on the pooled features, 70 epochs of SGD with Nesterov momentum, learning rate 0.01 per 256 images,
a tenth of it from epoch 30 on, no weight decay, random resized crops and flips; BatchNorm trains too. The published
numbers (PIRL section 4.3) are top-5 on ImageNet with 1 % and 10 % of the labels.
"""

import copy
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.data import OnBadImage
from sslfast.device import resolve_precision
from sslfast.distributed import distributed_device, mean_over_ranks, replicate
from sslfast.evaluation.encoders import TRAINED, TrunkEncoder, load_run, trunk_encoders
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.folders import drawn_rows, listed_rows, load_manifests, take_rows
from sslfast.evaluation.linear_sgd import check_finite, score_row
from sslfast.evaluation.results import data_facts, evaluation_folder, run_facts, write_result
from sslfast.evaluation.sgd import SEMISUP, Progress, TrainingImages, check_training, count_hits
from sslfast.evaluation.table import layer_table
from sslfast.models import seeded
from sslfast.optim import set_learning_rate
from sslfast.runs import versions


class FineTuned(nn.Module):
    """A copy of a trunk under a linear classifier.

    Args:
        encoder: whose trunk and normalisation are taken; left as it was.
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
    progress: Progress,
) -> None:
    """Train all weights. Gradients are averaged over ranks; BatchNorm sees each rank's part of the batch."""
    model.train()
    optimizer = SEMISUP.optimizer(model, batch_size=batch_size)
    start = progress.load(model, optimizer)
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
        check_finite({"the classifier": loss.detach()}, epoch)
        progress.save(model, optimizer, epoch + 1)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean_over_ranks(buffer))
    model.eval()


def evaluate_semisup(
    run: Path,
    data: Path,
    *,
    fraction: float = 0.01,
    subset: Path | None = None,
    encoders: tuple[str, ...] = (TRAINED,),
    epochs: int = SEMISUP.epochs,
    seeds: tuple[int, ...] = (0,),
    size: int | None = None,
    batch_size: int = 256,
    precision: Literal["auto", "bf16", "fp32"] = "fp32",
    workers: int = 0,
    device: str = "auto",
    on_bad_image: OnBadImage = "error",
    output: Path | None = None,
) -> dict[str, Any]:
    """Accuracy of a run's encoder after fine-tuning on a part of the labels.

    Args:
        run: run directory, or a file of weights (a checkpoint, sslfast export, VISSL, PyContrast, MoCo), whose
            results go to FILE.evaluation in place of RUN/evaluation.
        data: folder with train/<class>/ and val/<class>/.
        fraction: share of train that is used, the same of every class, drawn by seed; at least one image of each.
        subset: file that lists the images to use instead, one name a line (SimCLR's lists for ImageNet).
        encoders: trained, untrained (supervised learning from scratch on the same images) or both.
        epochs: passes over the part; the drop of the rate scales with it.
        seeds: of the draw, initial classifier, order and crops. Several: mean and spread.
        size: side of the images in pixels; default: that of the run.
        batch_size: images per step; the rate scales with it.
        precision: of the network.
        workers: decoding threads, and processes where images are augmented; 0: none besides the main one.
        device: auto, cpu, cuda or cuda:N.
        on_bad_image: error: stop at an image that cannot be used. skip: leave it out and count it.
        output: JSON file to write; default: RUN/evaluation/semisup-1%.json (or the list's name).

    Goes on at the last whole epoch when it was stopped.
    """
    check_training(epochs, batch_size, seeds)
    part = f"{100 * fraction:g}%" if subset is None else Path(subset).stem
    path = evaluation_folder(run) / f"semisup-{part}.json" if output is None else output
    with distributed_device(device) as chosen:
        train, val = load_manifests(data, on_bad_image=on_bad_image)
        parts = {
            seed: take_rows(
                train, drawn_rows(train, fraction, seed=seed) if subset is None else listed_rows(train, subset)
            )
            for seed in seeds
        }
        loaded = load_run(run)
        bases = trunk_encoders(loaded, encoders)
        size = loaded.size if size is None else size
        reader = ImageReader(val, size, batch_size, workers, on_bad_image)
        dtype = resolve_precision(precision, chosen)
        facts = {
            **run_facts(run, loaded, size),
            **SEMISUP.facts(epochs, batch_size),
            "precision": str(dtype).removeprefix("torch."),
            "subset": {
                "fraction": fraction if subset is None else None,
                "file": None if subset is None else str(subset),
                "images": [len(some) for some in parts.values()],
                "digests": [some.digest() for some in parts.values()],
            },
            "seeds": list(seeds),
            "source": SEMISUP.source,
        }
        labels = torch.from_numpy(val.labels)
        name = f"{SEMISUP.full_name(epochs)}-{part}"
        rows, count, states = [], 0, []
        for encoder_name, base in bases.items():
            base.to(chosen)
            pairs = []
            for seed, some in parts.items():
                progress = Progress(
                    path.with_name(f"{path.stem}-{encoder_name}-seed{seed}.partial.pt"),
                    {**facts, "subset": some.digest(), "seeds": seed, "encoder": encoder_name},
                )
                states.append(progress)
                model = FineTuned(base, classes=len(train.classes), seed=seed).to(chosen)
                images = TrainingImages(
                    some,
                    size=size,
                    batch_size=batch_size,
                    seed=seed,
                    workers=workers,
                    on_bad_image=on_bad_image,
                    device=chosen,
                )
                with closing(images):
                    fine_tune(
                        model,
                        images,
                        epochs=epochs,
                        batch_size=batch_size,
                        device=chosen,
                        precision=dtype,
                        progress=progress,
                    )
                found, count = count_hits(lambda x, model=model: {"": model(x)}, [""], reader, labels, chosen)
                pairs.append(found[""])
            rows.append({"encoder": encoder_name, "protocol": name, **score_row(pairs, count)})
        result = {
            "protocol": name,
            "results": rows,
            **facts,
            "data": data_facts(data, (train, val), [len(parts[seeds[0]]), count]),
            "versions": versions(),
        }
        result["data"]["train"]["left_out"] = len(train.excluded)
        write_result(result, path)
        for progress in states:
            progress.remove()
        return result


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return layer_table(result)
