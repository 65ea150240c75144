"""What an evaluation of frozen features works on: features, labels and image locations of both splits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslfast.data import ImageLocation, OnBadImage
from sslfast.device import resolve_device
from sslfast.evaluation.cache import FeatureCache
from sslfast.evaluation.encoders import Encoder, extract_all, load_run
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.results import cache_folder, data_facts, run_facts
from sslfast.runs import versions


@dataclass(kw_only=True)
class EvaluationSet:
    """Features and labels of a labelled data set for every encoder of a run."""

    train: dict[str, Tensor]
    """Encoder name -> float32 ``[N_train, D]``."""
    train_labels: Tensor
    """``[N_train]`` int64."""
    val: dict[str, Tensor]
    """Encoder name -> float32 ``[N_val, D]``."""
    val_labels: Tensor
    """``[N_val]`` int64."""
    train_places: list[ImageLocation]
    """File of each row of ``train``."""
    val_places: list[ImageLocation]
    """File of each row of ``val``."""
    classes: list[str]
    """Class names in label order."""
    facts: dict[str, Any]
    """Run, checkpoint, data and versions, JSON values only."""


def load_evaluation_set(
    run: Path | str,
    data: Path | str,
    *,
    size: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    on_bad_image: OnBadImage = "error",
    cache: bool = True,
    encoders: Callable[[Mapping[str, Encoder]], Mapping[str, Encoder]] = dict,
) -> EvaluationSet:
    """Features of ``data/train`` and ``data/val`` for the trained encoder, the untrained one and raw pixels.

    Everything that can be wrong with the run or the folders is an error before the first image is decoded. ``cache``:
    keep the features in :func:`cache_folder`, and take them from there where they are. ``encoders``: takes the three
    and returns those that are wanted, or others made of them.
    """
    chosen = resolve_device(device)
    manifests = load_manifests(data, on_bad_image=on_bad_image)
    loaded = load_run(run)
    wanted = encoders(loaded.encoders)
    size = loaded.size if size is None else size
    found = [
        extract_all(
            wanted,
            manifest,
            size=size,
            batch_size=batch_size,
            device=chosen,
            workers=workers,
            on_bad_image=on_bad_image,
            cache=FeatureCache(cache_folder(run) if cache else None),
        )
        for manifest in manifests
    ]
    labels = [torch.from_numpy(m.labels)[f.rows] for m, f in zip(manifests, found, strict=True)]
    places = [[m.location(row) for row in f.rows.tolist()] for m, f in zip(manifests, found, strict=True)]
    counts = [len(part.rows) for part in found]
    facts = {**run_facts(run, loaded, size), "data": data_facts(data, manifests, counts), "versions": versions()}
    return EvaluationSet(
        train=found[0].values,
        train_labels=labels[0],
        val=found[1].values,
        val_labels=labels[1],
        train_places=places[0],
        val_places=places[1],
        classes=manifests[0].classes,
        facts=facts,
    )
