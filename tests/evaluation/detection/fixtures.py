"""Pictures of coloured rectangles with their boxes, in the formats of VOC and of COCO, and a run of a narrow trunk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from sslfast.config import save_json, to_dict
from sslfast.evaluation.detection.data import TrainingBatches, load_splits
from sslfast.evaluation.detection.model import FasterRCNN
from sslfast.evaluation.detection.train import PROTOCOLS, fine_tune
from sslfast.evaluation.encoders import load_run, trunk_encoders
from sslfast.evaluation.sgd import ResumeState
from sslfast.methods.pirl import PIRL
from sslfast.models.resnet import ResNetConfig
from sslfast.runs.checkpoint import save_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, ViewConfig
from tests.tiny import context

COLOURS = {"bird": (230, 20, 20), "car": (20, 220, 30)}
SIDE = 64
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "lr": 0.8,  # at 16 pictures: 0.2 at 4
    "train_sides": (64,),
    "test_side": 64,
    "longest_side": 96,
    "anchors": (28,),
    "regions": 16,
    "workers": 0,
    "device": "cpu",
}
"""Options of an evaluation that takes seconds."""

Box = tuple[str, tuple[int, int, int, int], bool]
"""Class; left, top, right, bottom as edges; difficult."""


def objects(number: int) -> list[Box]:
    """One rectangle on each picture; every fifth has a difficult one beside it."""
    rng = np.random.default_rng(number)
    name = list(COLOURS)[number % 2]
    width, height = (int(edge) for edge in rng.integers(24, 34, 2))
    left, top = int(rng.integers(0, SIDE - width)), int(rng.integers(0, SIDE - height))
    found = [(name, (left, top, left + width, top + height), False)]
    if number % 5 == 4:
        found.append(("car", (SIDE, 10, SIDE + 16, 40), True))
    return found


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(1000 + number)
    sheet = Image.fromarray(rng.integers(110, 140, (SIDE, SIDE + 16, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(sheet)
    for name, (left, top, right, bottom), difficult in objects(number):
        colour = (128, 118, 124) if difficult else COLOURS[name]
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return sheet


def write_boxed_voc(root: Path, *, trainval: range, test: range | None = None, name: str = "VOC2007") -> Path:
    voc = root / name
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (voc / part).mkdir(parents=True)
    for split, numbers in (("trainval", trainval), ("test", test)):
        if numbers is None:
            continue
        for number in numbers:
            picture(number).save(voc / "JPEGImages" / f"{number:06d}.jpg", quality=95)
            parts = []
            for label, (left, top, right, bottom), difficult in objects(number):
                edges = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
                corners = "".join(f"<{key}>{edge}</{key}>" for key, edge in edges.items())
                parts.append(
                    f"<object><name>{label}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox>"
                    "</object>"
                )
            (voc / "Annotations" / f"{number:06d}.xml").write_text(f"<annotation>{''.join(parts)}</annotation>")
        lines = "".join(f"{number:06d}\n" for number in numbers)
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return voc


def write_boxed_coco(root: Path, *, train: range, val: range) -> Path:
    """The same pictures and boxes as :func:`write_boxed_voc`; difficult objects are marked ``ignore``."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 10 * label, "name": name} for label, name in enumerate(COLOURS, 1)]
    ids = {category["name"]: category["id"] for category in categories}
    for split, numbers in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in numbers:
            picture(number).save(root / split / f"{number:06d}.jpg", quality=95)
            images.append({"id": number, "file_name": f"{number:06d}.jpg", "width": SIDE + 16, "height": SIDE})
            for label, (left, top, right, bottom), difficult in objects(number):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": ids[label],
                        "bbox": [left, top, right - left, bottom - top],
                        "iscrowd": 0,
                        "ignore": int(difficult),
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_narrow_run(path: Path, *, model: ResNetConfig | None = None) -> Path:
    """A run of a ResNet-18 with an eighth of the channels, saved as it was at its start but for another seed."""
    config = TrainConfig(
        recipe="test",
        method=PIRL.Config(pretext_weight=0.0, image_view=ViewConfig(crop=CropConfig(size=24))),
        model=model or ResNetConfig(name="resnet18", width=0.125),
        seed=3,
    )
    method = config.method.build(context(config.model, 4, seed=8))
    path.mkdir(parents=True)
    save_json(path / "config.json", to_dict(config))
    save_checkpoint(path / "checkpoints", {"step": 5, "method": method.state_dict()}, 5)
    return path


def train_detector(
    run: Path,
    voc: Path,
    *,
    moco: bool,
    iterations: int = 4,
    resume: ResumeState | None = None,
    dtype: torch.dtype = torch.float32,
) -> FasterRCNN:
    """A few iterations of a protocol with weights of ``dtype``; returns the detector."""
    protocol = PROTOCOLS["moco" if moco else "pirl"]
    (encoder,) = trunk_encoders(load_run(run), ["trained"]).values()
    data = load_splits([voc])[0]
    batches = TrainingBatches(
        data, ["bird", "car"], batch_size=4, seed=0, sides=(64,), longest=96, difficult="train", workers=0
    )
    norms = {"frozen_norm": protocol.frozen_norm, "freeze_at": protocol.freeze_at, "extra_norm": protocol.extra_norm}
    model = FasterRCNN(encoder, classes=2, seed=0, anchors=(28,), regions=16, **norms).to(dtype)  # type: ignore[arg-type]
    schedule = protocol.schedule(sets=1, iterations=iterations, batch_size=4, lr=0.1)
    fine_tune(
        model,
        batches,
        schedule,
        frozen_norm=protocol.frozen_norm,
        device=torch.device("cpu"),
        precision=torch.float32,
        resume=resume or ResumeState(None, {}),
        save_every=2,
    )
    return model
