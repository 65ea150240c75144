"""Features, labels and image locations of both splits of a labelled data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslfast.data import ImageLocation, Manifest
from sslfast.device import resolve_device
from sslfast.evaluation.cache import FeatureCache
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.encoders import Encoder, RunEncoders, chosen_encoders, extract_images, load_run
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.results import cache_folder, data_facts, run_facts
from sslfast.runs import versions


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(ImageConfig):
    """How the features of frozen encoders are computed."""

    encoders: tuple[str, ...] = ()
    """Of trained, untrained and "raw pixels"; default: all three. trained alone leaves out the baselines, and their
    time and memory."""
    cache: bool = True
    """Keep features in RUN/evaluation/features and read them from there; the folder may be deleted. Without it they
    must fit into memory, or go to --features-dir."""
    features_dir: Path | None = None
    """Folder of the features in place of RUN/evaluation/features, for example on a disk of each machine: ranks that
    share no files exchange them, and each machine has its own copy. With --no-cache they are deleted in the end."""


def feature_cache(run: Path | str, config: FeatureConfig) -> FeatureCache:
    """Where the configuration keeps features."""
    if config.features_dir is not None:
        return FeatureCache(config.features_dir, keep=config.cache)
    return FeatureCache(cache_folder(run) if config.cache else None)


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
    train_locations: list[ImageLocation]
    """Where the image of each row of ``train`` is stored."""
    val_locations: list[ImageLocation]
    """Where the image of each row of ``val`` is stored."""
    classes: list[str]
    """Class names in label order."""
    facts: dict[str, Any]
    """Run, checkpoint, data and versions, JSON values only."""


def load_evaluation_set(
    run: Path | str,
    data: Path | str,
    config: FeatureConfig = FeatureConfig(),
    *,
    encoders: Callable[[Mapping[str, Encoder]], Mapping[str, Encoder]] = dict,
    loaded: RunEncoders | None = None,
    check: Callable[[Manifest], None] = lambda _train: None,
) -> EvaluationSet:
    """Features of ``data/train`` and ``data/val`` for the trained encoder, the untrained encoder and raw pixels.

    Args:
        run: run directory or file of weights.
        data: folder with ``train/<class>/`` and ``val/<class>/``.
        config: image size, batches, cache.
        encoders: maps the three encoders by name to those that are used.
        loaded: the encoders of ``run``, where they are loaded already.
        check: called with the training images before any is decoded; raises where the evaluation needs others.

    Raises:
        UnsuitableError: the folders hold no data set that an encoder can be evaluated on.
        ValueError, FileNotFoundError: something is wrong with the run or the folders; before any image is decoded.
    """
    device = resolve_device(config.device)
    manifests = load_manifests(data, on_bad_image=config.on_bad_image, decoding=config.decoding(run))
    loaded = load_run(run, prefix=config.prefix, patches=config.patches) if loaded is None else loaded
    check(manifests[0])
    wanted = encoders(chosen_encoders(loaded, config.encoders))
    size = loaded.size if config.size is None else config.size
    seen = config.seen(size)
    cache = feature_cache(run, config)
    readers = config.readers(manifests, size, seen)
    found = [extract_images(wanted, reader, device=device, cache=cache) for reader in readers]
    labels = [torch.from_numpy(m.labels)[f.rows] for m, f in zip(manifests, found, strict=True)]
    locations = [[m.location(row) for row in f.rows.tolist()] for m, f in zip(manifests, found, strict=True)]
    counts = [len(part.rows) for part in found]
    chosen = [reader.chosen for reader in readers]
    facts = {
        **run_facts(run, loaded, size, seen, chosen),
        "data": data_facts(data, manifests, counts),
        "versions": versions(),
    }
    return EvaluationSet(
        train=found[0].values,
        train_labels=labels[0],
        val=found[1].values,
        val_labels=labels[1],
        train_locations=locations[0],
        val_locations=locations[1],
        classes=manifests[0].classes,
        facts=facts,
    )
