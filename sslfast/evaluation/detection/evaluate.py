"""Object detection by a fine-tuned Faster R-CNN R50-C4: protocols ``detect-pirl-...`` and ``detect-moco-...``.

``pirl``: BatchNorm of the trunk frozen, small rate, long warm-up. ``moco``: BatchNorm trains over all processes, one
more behind res5, larger rate. Their numbers cannot be compared with one another: with the same kind of trunk the second
is about two points of AP above the first. Published numbers are VOC 2007's (``voc07_ap`` ...) on test2007.
"""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from sslfast.data import decode_full, quiet_pillow, read_bytes
from sslfast.device import resolve_precision
from sslfast.distributed import distributed_device, is_main, world_size
from sslfast.evaluation import (
    TRAINED,
    Progress,
    check_training,
    detection_table,
    evaluation_folder,
    load_run,
    mean_and_spread,
    run_facts,
    trunk_encoders,
    write_result,
)
from sslfast.evaluation.detection.data import BoxedImage, BoxedImages, Difficult, TrainingBatches, load_splits
from sslfast.evaluation.detection.model import ANCHORS, FasterRCNN, check_trunk
from sslfast.evaluation.detection.scores import (
    DIFFICULT_RULE,
    Detections,
    coco_scores,
    require_pycocotools,
    voc07_scores,
)
from sslfast.evaluation.detection.train import PROTOCOLS, Schedule, detect, fine_tune
from sslfast.models import read_trunk_config
from sslfast.runs import versions

SIDES = tuple(range(480, 801, 32))
SHOWN_SCORE = 0.5
_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#dc2626")


def evaluate_detect(
    run: Path,
    data: tuple[Path, ...],
    *,
    protocol: Literal["pirl", "pirl-paper", "moco"] = "pirl",
    iterations: int | None = None,
    batch_size: int = 16,
    lr: float | None = None,
    seeds: tuple[int, ...] = (0,),
    encoders: tuple[str, ...] = (TRAINED,),
    difficult: Difficult = "train",
    train_split: str | None = None,
    test_split: str | None = None,
    train_sides: tuple[int, ...] = SIDES,
    test_side: int = 800,
    longest_side: int = 1333,
    anchors: tuple[int, ...] = ANCHORS,
    regions: int = 512,
    examples: int = 8,
    save_every: int = 500,
    precision: Literal["auto", "bf16", "fp32"] = "fp32",
    workers: int = 4,
    device: str = "auto",
    output: Path | None = None,
) -> dict[str, Any]:
    """Average precision of a Faster R-CNN that is fine-tuned on a run's encoder.

    Args:
        run: run directory, or a file of weights (sslfast export, VISSL, PyContrast, MoCo). The trunk
            has the imagenet stem.
        data: VOC folders (VOC2007 VOC2012): trainval of all is trained on, test of the first that has it is scored. Or
            COCO-format folders: annotations/instances_<split>.json with pictures in <split>/ or images/.
        protocol: pirl: frozen BatchNorm, settings of VISSL. pirl-paper: the rate and warm-up that the paper states.
            moco: BatchNorm trains. The last is not comparable with the others.
        iterations: default: as published, 25,000 (pirl; 12,500 for one set) or 24,000 (moco). Drops of the rate and
            the warm-up scale with it, and the protocol's name says so.
        batch_size: pictures per iteration, of all processes; the rate scales with it.
        lr: rate at 16 pictures; default: the protocol's.
        seeds: of the new layers, order, sizes, mirrors and sampled regions. Several: mean and spread.
        encoders: trained, untrained or both.
        difficult: objects marked difficult, in training: train on them, as the published numbers do, or ignore what
            overlaps them. Scoring always leaves them out.
        train_split: default trainval (COCO: train...).
        test_split: default test (COCO: val...).
        train_sides: the shorter side of a training picture is one of these.
        test_side: shorter side of a test picture.
        longest_side: most pixels of the longer side.
        anchors: their sides in pixels.
        regions: sampled of each training picture.
        examples: test pictures in detect-examples.png; 0: none.
        save_every: iterations between saved states; a stopped evaluation goes on at the last one.
        precision: of the network.
        workers: decoding threads; 0: none besides the main one.
        device: auto, cpu, cuda or cuda:N.
        output: JSON file to write; default: RUN/evaluation/detect.json.

    Under torchrun the processes share batches and test pictures.
    """
    require_pycocotools()
    counts = (min(train_sides, default=0), test_side, longest_side, min(anchors, default=0), regions, save_every)
    _check(iterations, batch_size, lr, seeds, counts)
    path = evaluation_folder(run) / "detect.json" if output is None else output
    chosen = PROTOCOLS[protocol]
    with distributed_device(device) as on:
        loaded = load_run(run)
        check_trunk(read_trunk_config(loaded.facts["model"]))
        bases = trunk_encoders(loaded, encoders)
        train, test = load_splits(data, train_split=train_split, test_split=test_split)
        classes = train.classes()
        schedule = chosen.schedule(sets=len(data), iterations=iterations, batch_size=batch_size, lr=lr)
        dtype = resolve_precision(precision, on)
        name = protocol_name(protocol, data, schedule)
        facts: dict[str, Any] = {
            **run_facts(run, loaded, test_side),
            "schedule": {**asdict(schedule), "drops": list(schedule.drops)},
            "batch_size": batch_size,
            "processes": world_size(),
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "batch_norm": "frozen" if chosen.frozen_norm else "trained over all processes",
            "freeze_at": chosen.freeze_at,
            "extra_norm": chosen.extra_norm,
            "train_sides": list(train_sides),
            "test_side": test_side,
            "longest_side": longest_side,
            "anchors": list(anchors),
            "regions": regions,
            "precision": str(dtype).removeprefix("torch."),
            "difficult": {"training": difficult, "scoring": DIFFICULT_RULE},
            "source": chosen.source,
        }
        digests = {split.name: split.digest() for split in (train, test)}
        rows, states, left_out = [], [], 0
        for encoder_name, base in bases.items():
            base.to(on)
            scores: list[dict[str, float]] = []
            by_class: list[dict[str, float]] = []
            for seed in seeds:
                progress = Progress(
                    path.with_name(f"{path.stem}-{encoder_name}-seed{seed}.partial.pt"),
                    {**facts, "protocol": name, "data": digests, "seed": seed, "encoder": encoder_name},
                )
                states.append(progress)
                batches = TrainingBatches(
                    train,
                    classes,
                    batch_size=batch_size,
                    seed=seed,
                    sides=train_sides,
                    longest=longest_side,
                    difficult=difficult,
                    workers=workers,
                )
                left_out = batches.left_out
                model = FasterRCNN(
                    base,
                    classes=len(classes),
                    seed=seed,
                    frozen_norm=chosen.frozen_norm,
                    freeze_at=chosen.freeze_at,
                    extra_norm=chosen.extra_norm,
                    anchors=anchors,
                    regions=regions,
                ).to(on)
                fine_tune(
                    model,
                    batches,
                    schedule,
                    frozen_norm=chosen.frozen_norm,
                    device=on,
                    precision=dtype,
                    progress=progress,
                    save_every=save_every,
                    words=f"{name}, {encoder_name}, seed {seed}",
                )
                found = detect(
                    model, test, side=test_side, longest=longest_side, device=on, precision=dtype, workers=workers
                )
                areas, classwise = coco_scores(found, test.images, classes)
                points = voc07_scores(found, test.images, classes)
                scores.append({**areas, **{f"voc07_{key}": value for key, value in points.items()}})
                by_class.append(classwise)
                if examples and encoder_name == next(iter(bases)) and seed == seeds[0] and is_main():
                    draw_examples(found, test, classes, examples).save(_made(path.with_name("detect-examples.png")))
            rows.append({"encoder": encoder_name, "protocol": name, **_score_row(scores, by_class)})
        result = {
            "protocol": name,
            "results": rows,
            **facts,
            "scores": "ap: COCO's, by pycocotools; voc07_ap: mean at 11 recalls, as published numbers on test2007",
            "seeds": list(seeds),
            "data": {
                "root": [str(folder) for folder in data],
                "classes": len(classes),
                "train": {"images": len(train.images) - left_out, "left_out": left_out, "digest": digests["train"]},
                "val": {"images": len(test.images), "left_out": 0, "digest": digests["test"]},
            },
            "versions": {**versions(), "torchvision": version("torchvision"), "pycocotools": version("pycocotools")},
        }
        write_result(result, path)
        for progress in states:
            progress.remove()
        return result


def protocol_name(protocol: str, data: Sequence[Path], schedule: Schedule) -> str:
    """``detect-pirl-voc07+12``, with the iterations where they are not the published ones."""
    sets = "+".join(Path(folder).resolve().name.lower() for folder in data)
    sets = {"voc2007": "voc07", "voc2007+voc2012": "voc07+12"}.get(sets, sets)
    changed = schedule.iterations != schedule.published_iterations
    return f"detect-{protocol}-{sets}" + (f"-{schedule.iterations}it" if changed else "")


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return detection_table(result)


def draw_examples(found: Sequence[Detections], split: BoxedImages, classes: Sequence[str], count: int) -> Image.Image:
    """Test pictures, evenly spread over the split, with the boxes of score 0.5 and more; thin white: the truth."""
    count = min(count, len(split.images))
    places = [round(i * (len(split.images) - 1) / max(1, count - 1)) for i in range(count)]
    tiles = [_tile(found[place], split.images[place], classes) for place in places]
    columns, gap = min(4, count), 8
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), "white")
    for position, tile in enumerate(tiles):
        line, column = divmod(position, columns)
        sheet.paste(tile, (gap + column * (width + gap), gap + line * (height + gap)))
    return sheet


def _tile(found: Detections, image: BoxedImage, classes: Sequence[str], *, side: int = 320) -> Image.Image:
    with quiet_pillow():
        picture = Image.fromarray(decode_full(read_bytes(image.path)))
    scale = side / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for box in image.boxes:
        draw.rectangle([float(edge) * scale for edge in box], outline="white", width=1)
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        if score < SHOWN_SCORE:
            continue
        left, top, right, bottom = (float(edge) * scale for edge in box)
        colour = _COLOURS[int(label) % len(_COLOURS)]
        draw.rectangle([left, top, right, bottom], outline=colour, width=3)
        words = f"{classes[int(label) - 1]} {100 * score:.0f} %"
        place = (min(left, picture.width - draw.textlength(words, font)), max(0.0, top - 16))
        draw.rectangle(draw.textbbox(place, words, font), fill=colour)
        draw.text(place, words, fill="white", font=font)
    return picture


def _score_row(scores: Sequence[dict[str, float]], by_class: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds; of several also the spread and the values."""
    row: dict[str, Any] = {}
    for key in scores[0]:
        values = [one[key] for one in scores]
        row[key], spread = mean_and_spread(values)
        if len(values) > 1:
            row[f"{key}_spread"], row[f"{key}_of_seeds"] = spread, values
    row["ap50_of_classes"] = {name: mean_and_spread([one[name] for one in by_class])[0] for name in by_class[0]}
    return row


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check(
    iterations: int | None, batch_size: int, lr: float | None, seeds: Sequence[int], counts: Sequence[int]
) -> None:
    """ValueError for numbers that no detector can have."""
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations=}")
    check_training(1, batch_size, seeds)
    if lr is not None and not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr=}")
    if min(counts) < 1:
        raise ValueError(
            f"sides, anchors, regions and save_every must be numbers of at least 1, got {min(counts)} in one"
        )
