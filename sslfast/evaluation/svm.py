"""Linear SVMs on frozen features of Pascal VOC, with all images and with k of each class: protocols ``voc-svm-...``.

Pooled maps (:mod:`sslfast.evaluation.layers`) of whole images, squeezed to a square (VISSL resizes the shorter side to
256, then both sides to 224), each row divided by its norm; one SVM per class by
liblinear (squared hinge, L2, dual, twice the weight for positives, at most 2000 iterations). With all images the cost
of each class is the one with the best average precision in 3-fold cross-validation. With k images (k positives and
``(C - 1) k`` negatives per class, several draws) there are too few to validate on: as in the public code, the cost is
the one with the best mean AP over the draws on the test images, one for all classes; ``map_of_costs`` has all of them.

Source: Goyal et al., ICCV 2019, sections 5 and 6.1, and the settings of VISSL's VOC07 benchmarks: images that show a
class only as difficult objects count as negatives when the SVM of all images is trained (``difficult="negative"``),
and are left out of the low-shot draws and of every test.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from sslfast.config import to_dict
from sslfast.distributed import distributed_device, gather_objects, own_rows
from sslfast.evaluation.average_precision import average_precision
from sslfast.evaluation.config import check_at_least, check_positive
from sslfast.evaluation.dataset import FeatureConfig, feature_cache
from sslfast.evaluation.encoders import TRAINED, extract_layers, load_run, trunk_encoders
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.folders import random_order
from sslfast.evaluation.layers import check_layers
from sslfast.evaluation.results import (
    departures,
    evaluation_folder,
    mean_and_spread,
    run_facts,
    write_result,
)
from sslfast.evaluation.table import precision_table
from sslfast.evaluation.voc import VOCSplit, read_split, voc_manifest
from sslfast.runs import versions

SVM_PROTOCOL = "voc-svm"
COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
FOLDS = 3
FIRST_STEP = 2
"""First Philox step of the draws, in the stream that folders.py also draws from."""

Difficult = Literal["negative", "ignore"]

Item = TypeVar("Item")
Found = TypeVar("Found")
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SvmConfig(FeatureConfig):
    """Settings of :func:`evaluate_svm`."""

    layers: tuple[str, ...] = ("conv1", "res2", "res3", "res4", "res5")
    """For SVMs on all images, of conv1 res2 res3 res4 res5 res5avg."""
    shots: tuple[int, ...] = SHOTS
    """Numbers of positives per class for low-shot SVMs."""
    shot_layers: tuple[str, ...] = ("res4", "res5")
    """For low-shot SVMs."""
    draws: int = 5
    """Low-shot sets of each size; mean and standard deviation are over these."""
    seed: int = 0
    """Of the draws."""
    costs: tuple[float, ...] = COSTS
    """Costs of the SVMs to choose from."""
    difficult: Difficult = "negative"
    """How the SVM on all images treats an image that shows a class only as difficult objects: as a negative, as in the
    published numbers, or ignore it. Tests and low-shot sets always ignore it."""
    encoders: tuple[str, ...] = (TRAINED,)
    """trained, untrained or both."""
    train_split: str = "trainval"
    """Of ImageSets/Main."""
    test_split: str = "test"
    """Of ImageSets/Main."""
    size: int | None = None
    """Side of the images in pixels (published: 224); default: that of the run."""
    workers: int = 0
    """Decoding threads, and threads for SVMs; 0: one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers)
        if self.shots:
            check_layers(self.shot_layers)
        check_positive("costs", self.costs)
        check_at_least(1, draws=self.draws, shots=min(self.shots, default=None))
        check_at_least(0, seed=self.seed)


def normalise(features: NDArray[np.floating]) -> Matrix:
    """``x / (|x| + 1e-5)`` of every row, float64."""
    features = features.astype(np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def linear_svm(cost: float) -> Any:
    """The protocol's classifier, not yet fitted."""
    try:
        from sklearn.svm import LinearSVC
    except ImportError:
        raise ImportError("SVMs need scikit-learn: pip install 'sslfast[evaluation]'") from None
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=2000,
        random_state=0,
    )


def draw_shots(labels: NDArray[np.int8], k: int, *, seed: int, draw: int, position: int) -> NDArray[np.int64]:
    """Rows of k positives and ``(C - 1) k`` negatives of a class (all, if there are fewer), sorted.

    The draw for a smaller k is a subset of the draw for a larger one.

    Args:
        labels: ``[N, C]`` in -1, 0 and 1.
        k: positives.
        seed: of all draws.
        draw: number of the draw.
        position: of the class (column of ``labels``).
    """
    classes = labels.shape[1]
    order = random_order(len(labels), seed=seed, step=FIRST_STEP + draw * classes + position).numpy()
    column = labels[order, position]
    return np.sort(np.concatenate((order[column == 1][:k], order[column == -1][: (classes - 1) * k])))


def class_precision(scores: Matrix, column: NDArray[np.int8]) -> tuple[float, float]:
    """Average precision (area, 11-point) of a class on the images that are not difficult for it."""
    clear = column != 0
    targets = column[clear] == 1
    return (
        average_precision(targets, scores[clear]),
        average_precision(targets, scores[clear], kind="11-point"),
    )


def shared_map(function: Callable[[Item], Found], items: Sequence[Item], workers: int) -> list[Found]:
    """``[function(item)]`` in order: each rank does its part in ``workers`` threads (liblinear releases the GIL)."""
    own = own_rows(len(items))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(pool.map(function, items[own.start : own.stop]))
    return [one for part in gather_objects(found) for one in part]


def full_svm(
    train: Matrix,
    train_labels: NDArray[np.int8],
    test: Matrix,
    test_labels: NDArray[np.int8],
    *,
    classes: Sequence[str],
    costs: Sequence[float] = COSTS,
    difficult: Difficult = "negative",
    workers: int = 0,
) -> dict[str, Any]:
    """SVMs on all images: ``mAP``, ``mAP_11_point`` and per class its AP and its cost.

    Args:
        train, test: ``[N, D]`` normalised features.
        train_labels, test_labels: ``[N, C]`` in -1, 0 (difficult) and 1.
        classes: C names.
        costs: candidates.
        difficult: how label 0 is treated in training.
        workers: threads.
    """
    from sklearn.model_selection import cross_val_score

    def rows(position: int) -> tuple[Matrix, NDArray[np.int64]]:
        column = train_labels[:, position]
        kept = column != 0 if difficult == "ignore" else np.ones(len(column), dtype=bool)
        return train[kept], np.where(column[kept] == 1, 1, -1)

    def validate(task: tuple[int, float]) -> float:
        features, targets = rows(task[0])
        scores = cross_val_score(linear_svm(task[1]), features, targets, cv=FOLDS, scoring="average_precision")
        return float(scores.mean())

    tasks = [(position, cost) for position in range(len(classes)) for cost in costs]
    validated = np.array(shared_map(validate, tasks, workers)).reshape(len(classes), len(costs))
    chosen = [costs[best] for best in validated.argmax(1)]

    def judge(position: int) -> tuple[float, float]:
        svm = linear_svm(chosen[position]).fit(*rows(position))
        return class_precision(svm.decision_function(test), test_labels[:, position])

    found = shared_map(judge, range(len(classes)), workers)
    return {
        "mAP": float(np.mean([area for area, _ in found])),
        "mAP_11_point": float(np.mean([points for _, points in found])),
        "ap": {name: area for name, (area, _) in zip(classes, found, strict=True)},
        "cost": dict(zip(classes, chosen, strict=True)),
        "validation_ap": dict(zip(classes, validated.max(1).tolist(), strict=True)),
    }


def shot_svm(
    train: Matrix,
    train_labels: NDArray[np.int8],
    test: Matrix,
    test_labels: NDArray[np.int8],
    *,
    k: int,
    draws: int,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
    workers: int = 0,
) -> dict[str, Any]:
    """SVMs on k positives per class: mean and standard deviation of mAP over draws, at the cost of the best mean."""

    def judge(task: tuple[int, int]) -> list[float]:
        draw, position = task
        rows = draw_shots(train_labels, k, seed=seed, draw=draw, position=position)
        targets = train_labels[rows, position]
        svms = (linear_svm(cost).fit(train[rows], targets) for cost in costs)
        return [class_precision(svm.decision_function(test), test_labels[:, position])[0] for svm in svms]

    classes = train_labels.shape[1]
    tasks = [(draw, position) for draw in range(draws) for position in range(classes)]
    # [draws, costs]
    maps = np.array(shared_map(judge, tasks, workers)).reshape(draws, classes, len(costs)).mean(1)
    best = int(maps.mean(0).argmax())
    mean, spread = mean_and_spread(maps[:, best].tolist())
    return {
        "k": k,
        "mAP": mean,
        "mAP_spread": spread,
        "mAP_of_draws": maps[:, best].tolist(),
        "cost": costs[best],
        "cost_chosen_on": "test",
        "map_of_costs": {f"{cost:g}": float(value) for cost, value in zip(costs, maps.mean(0), strict=True)},
    }


def evaluate_svm(
    run: Path, data: Path, config: SvmConfig = SvmConfig(), *, output: Path | None = None
) -> dict[str, Any]:
    """Mean average precision of linear SVMs on a run's frozen features of Pascal VOC, with all and with few images.

    Args:
        run: run directory, or a file of weights (a checkpoint, sslfast export, VISSL, PyContrast, MoCo), whose
            results go to FILE.evaluation in place of RUN/evaluation.
        data: VOC folder (Annotations, ImageSets/Main, JPEGImages), such as VOCdevkit/VOC2007.
        config: settings.
        output: JSON file to write; default: RUN/evaluation/lowshot.json.

    Under torchrun the processes share images and SVMs.
    """
    linear_svm(1.0)  # before any work: is scikit-learn installed?
    splits = [read_split(data, name) for name in (config.train_split, config.test_split)]
    check_splits(splits, config.shots)
    loaded = load_run(run, prefix=config.prefix, patches=config.patches)
    encoders = trunk_encoders(loaded, config.encoders)
    size = loaded.size if config.size is None else config.size
    seen = config.seen(size, default="whole")
    results: list[dict[str, Any]] = []
    with distributed_device(config.device) as device, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Liblinear failed to converge")
        decoding = config.decoding(run)
        manifests = [voc_manifest(split.root, split.ids).decoded(decoding) for split in splits]
        readers = config.readers(manifests, size, seen)
        layers = list(dict.fromkeys((*config.layers, *(config.shot_layers if config.shots else ()))))
        cache = feature_cache(run, config)
        found = [extract_layers(encoders, layers, reader, device=device, cache=cache) for reader in readers]
        labels = [split.labels[features.rows.numpy()] for split, features in zip(splits, found, strict=True)]
        for encoder in encoders:
            for layer in layers:
                # Hundreds of megabytes each: free one before the next is made.
                train, test = (normalise(features.values.pop(f"{encoder}/{layer}").numpy()) for features in found)
                results += _layer_rows(encoder, layer, train, labels[0], test, labels[1], splits[0].classes, config)
        result = {
            "protocol": SVM_PROTOCOL,
            "config": to_dict(config),
            "results": results,
            **run_facts(run, loaded, size, seen, [reader.chosen for reader in readers]),
            "costs": list(config.costs),
            "folds": FOLDS,
            "difficult": config.difficult,
            "draws": config.draws,
            "draw_seed": config.seed,
            "ap": "area under the interpolated curve; mAP_11_point: mean at recall 0, 0.1 ... 1",
            "source": "Goyal et al., ICCV 2019; settings of VISSL's voc07 SVM benchmarks",
            "departures": departures(
                {
                    "size": 224,
                    "preprocessing": "whole",
                    "costs": list(COSTS),
                    "difficult": "negative",
                    "train_split": "trainval",
                    "test_split": "test",
                },
                {**to_dict(config), "size": size, "preprocessing": seen, "costs": list(config.costs)},
            ),
            "data": _data_facts(data, splits, readers, [len(features.rows) for features in found]),
            "versions": versions(),
        }
        write_result(result, output or evaluation_folder(run) / "lowshot.json")
        return result


def _layer_rows(
    encoder: str,
    layer: str,
    train: Matrix,
    train_labels: NDArray[np.int8],
    test: Matrix,
    test_labels: NDArray[np.int8],
    classes: Sequence[str],
    config: SvmConfig,
) -> list[dict[str, Any]]:
    """Results of one layer: with all images, and with k of each class."""
    common = {"encoder": encoder, "layer": layer, "features": train.shape[1]}
    rows = []
    if layer in config.layers:
        scores = full_svm(
            train,
            train_labels,
            test,
            test_labels,
            classes=classes,
            costs=config.costs,
            difficult=config.difficult,
            workers=config.workers,
        )
        rows.append({**common, "protocol": f"{SVM_PROTOCOL}-{layer}", **scores})
    for k in config.shots if layer in config.shot_layers else ():
        scores = shot_svm(
            train,
            train_labels,
            test,
            test_labels,
            k=k,
            draws=config.draws,
            costs=config.costs,
            seed=config.seed,
            workers=config.workers,
        )
        rows.append({**common, "protocol": f"{SVM_PROTOCOL}-k{k}-{layer}", **scores})
    return rows


def check_splits(splits: Sequence[VOCSplit], shots: Sequence[int]) -> None:
    """ValueError if the classes of the splits differ or one has too few images."""
    train, test = splits
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"classes of {train.name} and {test.name} differ ({', '.join(odd[:5])}); give both the same")
    if len(train.classes) < 2:
        raise ValueError(f"{train.root} has one class, {train.classes[0]}; an evaluation needs at least 2")
    for position, name in enumerate(train.classes):
        shown, absent = ((train.labels[:, position] == value).sum() for value in (1, -1))
        needed = max((FOLDS, *shots))
        if shown < needed or absent < FOLDS:
            lower = "lower --shots or " if shown >= FOLDS and absent >= FOLDS else ""
            raise ValueError(
                f"{train.name} has {shown} images of {name} and {absent} without it; {needed} and {FOLDS} are needed: "
                f"{lower}give more images"
            )
        if not (test.labels[:, position] == 1).any():
            raise ValueError(f"{test.name} has no image of {name}, so its average precision is not defined")


def _data_facts(
    data: Path, splits: Sequence[VOCSplit], readers: Sequence[ImageReader], counts: Sequence[int]
) -> dict[str, Any]:
    parts = {
        key: {
            "split": split.name,
            "images": count,
            "left_out": len(split.ids) - count,
            "digest": reader.manifest.digest(),
        }
        for key, split, reader, count in zip(("train", "val"), splits, readers, counts, strict=True)
    }
    return {"root": str(data), "classes": len(splits[0].classes), **parts}


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return precision_table(result)
