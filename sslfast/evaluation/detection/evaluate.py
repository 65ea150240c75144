"""Object detection by a fine-tuned Faster R-CNN R50-C4: protocols ``detect-pirl-...`` and ``detect-moco-...``.

``pirl``: the trunk's BatchNorm is frozen, small learning rate, long warm-up. ``moco``: BatchNorm trains, synchronised
over all processes, with one more layer after res5, and a larger learning rate. Their results are not comparable: with
the same trunk the second is about two points of AP above the first. Published numbers are VOC 2007's (``voc07_ap``
...) on test2007.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw

from sslfast.config import to_dict
from sslfast.data import DEFAULT_DECODING, Decoding, decode_full, quiet_pillow, read_bytes
from sslfast.device import resolve_precision
from sslfast.distributed import distributed_device, is_main, world_size
from sslfast.evaluation.config import DecodingConfig, check_at_least, check_positive, check_seeds
from sslfast.evaluation.detection.data import BoxedImage, BoxedImages, Difficult, TrainingBatches, load_splits
from sslfast.evaluation.detection.model import ANCHORS, FasterRCNN, check_trunk
from sslfast.evaluation.detection.scores import (
    DIFFICULT_RULE,
    Detections,
    coco_scores,
    require_pycocotools,
    voc07_scores,
)
from sslfast.evaluation.detection.train import PROTOCOLS, DetectionProtocol, Schedule, detect, fine_tune
from sslfast.evaluation.encoders import TRAINED, load_run, trunk_encoders
from sslfast.evaluation.lettering import Lettering
from sslfast.evaluation.results import departures, evaluation_folder, mean_and_spread, run_facts, write_result
from sslfast.evaluation.sgd import ResumeState
from sslfast.evaluation.table import detection_table
from sslfast.files import reason_of, save_picture
from sslfast.models import read_trunk_config
from sslfast.runs import print_error, versions
from sslfast.text import printable

SIDES = tuple(range(480, 801, 32))
SHOWN_SCORE = 0.5
_PUBLISHED = (
    "batch_size",
    "difficult",
    "train_sides",
    "test_side",
    "longest_side",
    "anchors",
    "regions",
)
"""Settings that are the same in every protocol."""
_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#dc2626")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(DecodingConfig):
    """Settings of :func:`evaluate_detection`."""

    protocol: Literal["pirl", "pirl-paper", "pirl-supervised", "moco"] = "pirl"
    """pirl: frozen BatchNorm, learning rate 0.002 of VISSL. pirl-paper: 0.003 and the warm-up that the paper states for
    PIRL and NPID++. pirl-supervised: 0.02 and 100 iterations of warm-up, the paper's for supervised and Jigsaw weights.
    moco: BatchNorm trains; not comparable with the others."""
    iterations: int | None = None
    """Default: as published, 25,000 (pirl; 12,500 for one set) or 24,000 (moco; 9,000 for one set). The learning rate's
    drops and the warm-up scale with it, and the protocol's name states it."""
    warmup: int | None = None
    """Iterations of warm-up; default: the protocol's."""
    batch_size: int = 16
    """Images per iteration, over all processes; the learning rate scales with it."""
    lr: float | None = None
    """Learning rate at 16 images; default: the protocol's."""
    seeds: tuple[int, ...] = (0,)
    """Of the new layers, order, sizes, flips and sampled regions. Several: mean and standard deviation."""
    encoders: tuple[str, ...] = (TRAINED,)
    """trained, untrained or both."""
    difficult: Difficult = "train"
    """Objects marked difficult, in training: train on them, as the published numbers do, or ignore what overlaps them.
    Scoring always ignores them."""
    train_split: str | None = None
    """Default: trainval (COCO: train...)."""
    test_split: str | None = None
    """Default: test (COCO: val...)."""
    train_sides: tuple[int, ...] = SIDES
    """The shorter side of a training image, in pixels, is one of these."""
    test_side: int = 800
    """Shorter side of a test image, in pixels."""
    longest_side: int = 1333
    """Maximum of the longer side, in pixels."""
    anchors: tuple[int, ...] = ANCHORS
    """Their sides in pixels."""
    regions: int = 512
    """Regions sampled from each training image."""
    examples: int = 8
    """Test images in detect-examples.png; 0: none."""
    save_every: int = 500
    """Iterations between two saved states; a stopped evaluation resumes from the last one."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Of the network."""
    workers: int = 4
    """Decoding threads; 0: decode in the main thread."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds(self.seeds)
        for name in ("train_sides", "anchors"):
            check_positive(name, getattr(self, name))
        for name in ("iterations", "batch_size", "test_side", "longest_side", "regions", "save_every"):
            check_at_least(1, **{name: getattr(self, name)})
        check_at_least(0, examples=self.examples, workers=self.workers, warmup=self.warmup)
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0, got lr={self.lr}")


def evaluate_detection(
    run: Path,
    data: tuple[Path, ...],
    config: DetectionConfig = DetectionConfig(),
    *,
    output: Path | None = None,
    report: Callable[[str], None] = print_error,
) -> dict[str, Any]:
    """Average precision of a Faster R-CNN that is fine-tuned on a run's encoder.

    Args:
        run: run directory, or a file of weights (sslfast export, VISSL, PyContrast, MoCo). The trunk
            has the imagenet stem.
        data: VOC folders (VOC2007 VOC2012): trainval of all is trained on, test of the first that has it is scored. Or
            COCO-format folders: annotations/instances_<split>.json with images in <split>/ or images/.
        config: settings.
        output: JSON file to write; default: RUN/evaluation/detect.json.
        report: receives a line of text at every saved state, on the first rank.

    Under torchrun the processes share batches and test images.
    """
    require_pycocotools()
    path = output or evaluation_folder(run) / "detect.json"
    protocol = PROTOCOLS[config.protocol]
    with distributed_device(config.device) as device:
        loaded = load_run(run, prefix=config.prefix, patches="off")
        check_trunk(read_trunk_config(loaded.facts["model"]))
        encoders = trunk_encoders(loaded, config.encoders)
        train, test = load_splits(data, train_split=config.train_split, test_split=config.test_split)
        schedule = protocol.schedule(
            sets=len(data),
            iterations=config.iterations,
            batch_size=config.batch_size,
            lr=config.lr,
            warmup=config.warmup,
        )
        classes = train.classes()
        name = protocol_name(config.protocol, data, schedule)
        precision = resolve_precision(config.precision, device)
        decoding = config.decoding(run)
        facts = {
            **run_facts(run, loaded, config.test_side),
            **_settings(config, protocol, schedule),
            "precision": str(precision).removeprefix("torch."),
        }
        digests = {split.name: split.digest() for split in (train, test)}
        rows, states, left_out = [], [], 0
        for encoder_name, encoder in encoders.items():
            encoder.to(device)
            scores: list[dict[str, float]] = []
            by_class: list[dict[str, float]] = []
            for seed in config.seeds:
                resume = ResumeState(
                    path.with_name(f"{path.stem}-{encoder_name}-seed{seed}.partial.pt"),
                    {
                        **facts,
                        "protocol": name,
                        "data": digests,
                        "seed": seed,
                        "encoder": encoder_name,
                        "decoding": asdict(decoding),
                    },
                )
                states.append(resume)
                batches = TrainingBatches(
                    train,
                    classes,
                    batch_size=config.batch_size,
                    seed=seed,
                    sides=config.train_sides,
                    longest=config.longest_side,
                    difficult=config.difficult,
                    workers=config.workers,
                    decoding=decoding,
                )
                left_out = batches.left_out
                model = FasterRCNN(
                    encoder,
                    classes=len(classes),
                    seed=seed,
                    frozen_norm=protocol.frozen_norm,
                    freeze_at=protocol.freeze_at,
                    extra_norm=protocol.extra_norm,
                    anchors=config.anchors,
                    regions=config.regions,
                ).to(device)
                fine_tune(
                    model,
                    batches,
                    schedule,
                    frozen_norm=protocol.frozen_norm,
                    device=device,
                    precision=precision,
                    resume=resume,
                    save_every=config.save_every,
                    report=report,
                    title=f"{name}, {encoder_name}, seed {seed}",
                )
                found = detect(
                    model,
                    test,
                    side=config.test_side,
                    longest=config.longest_side,
                    device=device,
                    precision=precision,
                    workers=config.workers,
                    decoding=decoding,
                )
                areas, classwise = coco_scores(found, test.images, classes)
                scores.append(
                    {
                        **areas,
                        **_named("voc07", voc07_scores(found, test.images, classes)),
                        **_named("voc07_detectron2", voc07_scores(found, test.images, classes, detectron2=True)),
                    }
                )
                by_class.append(classwise)
                if config.examples and len(states) == 1 and is_main():
                    _write_examples(
                        found, test, classes, config.examples, path.with_name("detect-examples.png"), decoding
                    )
            rows.append({"encoder": encoder_name, "protocol": name, **_score_row(scores, by_class)})
        result = {
            "protocol": name,
            "config": to_dict(config),
            "results": rows,
            **facts,
            "scores": "ap: COCO's, by pycocotools; voc07_ap: mean at 11 recalls, exact; voc07_detectron2_ap: as "
            "detectron2 computes published numbers on test2007 (scores of three decimals, np.arange's recalls)",
            "seeds": list(config.seeds),
            "data": {
                "root": [str(folder) for folder in data],
                "classes": len(classes),
                **{key: value for key, value in asdict(decoding).items() if value is not None},
                "train": {"images": len(train.images) - left_out, "left_out": left_out, "digest": digests["train"]},
                "val": {"images": len(test.images), "left_out": 0, "digest": digests["test"]},
            },
            "versions": {**versions(), "torchvision": version("torchvision"), "pycocotools": version("pycocotools")},
        }
        write_result(result, path)
        for resume in states:
            resume.remove()
        return result


def _settings(config: DetectionConfig, protocol: DetectionProtocol, schedule: Schedule) -> dict[str, Any]:
    """What the numbers depend on besides weights and data, for the record and to identify a stopped training."""
    return {
        "schedule": {**asdict(schedule), "drops": list(schedule.drops)},
        "batch_size": config.batch_size,
        "processes": world_size(),
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_norm": "frozen" if protocol.frozen_norm else "trained over all processes",
        "freeze_at": protocol.freeze_at,
        "extra_norm": protocol.extra_norm,
        "train_sides": list(config.train_sides),
        "test_side": config.test_side,
        "longest_side": config.longest_side,
        "anchors": list(config.anchors),
        "regions": config.regions,
        "difficult": {"training": config.difficult, "scoring": DIFFICULT_RULE},
        "padding": "to the largest sides of the batch",
        "source": protocol.source,
        "departures": _departures(config, protocol, schedule),
    }


def _departures(config: DetectionConfig, protocol: DetectionProtocol, schedule: Schedule) -> list[str]:
    """How settings depart from the protocol's."""
    scale = schedule.iterations / schedule.published_iterations
    usual = {name: to_dict(DetectionConfig())[name] for name in _PUBLISHED}
    published = {
        **usual,
        "iterations": schedule.published_iterations,
        "lr": protocol.lr,
        "warmup": round(protocol.warmup * scale),
    }
    used = {
        **to_dict(config),
        "iterations": schedule.iterations,
        "lr": schedule.lr * 16 / config.batch_size,
        "warmup": schedule.warmup,
    }
    return departures(published, used)


def _named(start: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{start}_{key}": value for key, value in scores.items()}


def protocol_name(protocol: str, data: Sequence[Path], schedule: Schedule) -> str:
    """``detect-pirl-voc07+12``, with the iterations where they are not the published ones."""
    sets = "+".join(Path(folder).resolve().name.lower() for folder in data)
    sets = {"voc2007": "voc07", "voc2007+voc2012": "voc07+12"}.get(sets, sets)
    changed = schedule.iterations != schedule.published_iterations
    return f"detect-{protocol}-{sets}" + (f"-{schedule.iterations}it" if changed else "")


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return detection_table(result)


def _write_examples(
    found: Sequence[Detections],
    split: BoxedImages,
    classes: Sequence[str],
    count: int,
    path: Path,
    decoding: Decoding,
) -> None:
    """Write :func:`draw_examples`. Where that fails one line says so: the scores do not need it."""
    try:
        save_picture(draw_examples(found, split, classes, count, decoding=decoding), path)
    except OSError as error:
        print_error(f"cannot write {printable(str(path))} ({reason_of(error)}): there is no picture of detections")


def draw_examples(
    found: Sequence[Detections],
    split: BoxedImages,
    classes: Sequence[str],
    count: int,
    *,
    decoding: Decoding = DEFAULT_DECODING,
) -> Image.Image:
    """Test images, evenly spread over the split, with the boxes of score 0.5 and above; thin white: ground truth."""
    count = min(count, len(split.images))
    positions = [round(i * (len(split.images) - 1) / max(1, count - 1)) for i in range(count)]
    lettering = Lettering()
    tiles = [_tile(found[position], split.images[position], classes, lettering, decoding) for position in positions]
    lettering.report()
    columns, gap = min(4, count), 8
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), "white")
    for position, tile in enumerate(tiles):
        line, column = divmod(position, columns)
        sheet.paste(tile, (gap + column * (width + gap), gap + line * (height + gap)))
    return sheet


def _tile(
    found: Detections,
    truth: BoxedImage,
    classes: Sequence[str],
    lettering: Lettering,
    decoding: Decoding,
    *,
    side: int = 320,
) -> Image.Image:
    with quiet_pillow():
        image = Image.fromarray(decode_full(read_bytes(truth.path), decoding))
    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(image)
    for box in truth.boxes:
        draw.rectangle([float(edge) * scale for edge in box], outline="white", width=1)
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        if score < SHOWN_SCORE:
            continue
        left, top, right, bottom = (float(edge) * scale for edge in box)
        colour = _COLOURS[int(label) % len(_COLOURS)]
        draw.rectangle([left, top, right, bottom], outline=colour, width=3)
        text, font = lettering.fitted(f"{100 * score:.0f} % {classes[int(label) - 1]}", 13, image.width)
        corner = (max(0.0, min(left, image.width - draw.textlength(text, font))), max(0.0, top - 16))
        draw.rectangle(draw.textbbox(corner, text, font), fill=colour)
        draw.text(corner, text, fill="white", font=font)
    return image


def _score_row(scores: Sequence[dict[str, float]], by_class: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds; of several seeds also the standard deviation and the values."""
    row: dict[str, Any] = {}
    for key in scores[0]:
        values = [one[key] for one in scores]
        row[key], spread = mean_and_spread(values)
        if len(values) > 1:
            row[f"{key}_spread"], row[f"{key}_of_seeds"] = spread, values
    row["ap50_of_classes"] = {name: mean_and_spread([one[name] for one in by_class])[0] for name in by_class[0]}
    return row
