"""Linear classifiers on frozen features: the configuration of all three protocols, and the choice between them.

The probe is :mod:`sslfast.evaluation.linear_probe`; Goyal et al.'s and MoCo's protocols are
:mod:`sslfast.evaluation.linear_sgd`.
"""

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sslfast.config import to_dict
from sslfast.device import resolve_precision
from sslfast.distributed import distributed_device
from sslfast.evaluation.config import check_at_least, check_positive, check_seeds
from sslfast.evaluation.dataset import FeatureConfig, load_evaluation_set
from sslfast.evaluation.encoders import TRAINED, load_run, trunk_encoders
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.linear_probe import L2_STRENGTHS, PROBE_PROTOCOL, linear_result
from sslfast.evaluation.linear_sgd import FrozenMaps, judge, train_heads
from sslfast.evaluation.results import accuracy_row, data_facts, evaluation_folder, run_facts, write_result
from sslfast.evaluation.sgd import GOYAL, MOCO, ResumeState, SGDProtocol, TrainingImages
from sslfast.evaluation.table import accuracy_table, layer_table
from sslfast.runs import versions

PROTOCOLS = {"goyal": GOYAL, "moco": MOCO}
"""Those that train by SGD."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(FeatureConfig):
    """Settings of :func:`evaluate_linear`."""

    protocol: Literal["probe", "goyal", "moco"] = "probe"
    """Which protocol; it is in the name of every result."""
    layers: tuple[str, ...] = ()
    """goyal: classifiers to train, of conv1 res2 res3 res4 res5 res5avg res5avg-plain (without BatchNorm); default:
    all."""
    encoders: tuple[str, ...] = ()
    """probe: of trained, untrained and "raw pixels", default all three. goyal, moco: trained (default), untrained or
    both."""
    epochs: int | None = None
    """goyal, moco: passes over the data; default: as published. The learning rate's drops scale with it."""
    strengths: tuple[float, ...] = L2_STRENGTHS
    """probe: L2 strengths to choose from on a held-out fifth of train."""
    seeds: tuple[int, ...] = (0,)
    """probe: of the held-out draw; else of initial weights, order and crops. Several: mean and standard deviation."""
    batch_size: int = 256
    """Images per forward pass; goyal, moco: also per step, and the learning rate scales with it."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """goyal, moco: of the frozen trunk; classifiers are float32."""
    workers: int = 0
    """Decoding threads, and processes where images are augmented; 0: decode in the main thread."""
    cache: bool = True
    """probe: keep features in RUN/evaluation/features and read them from there; the folder may be deleted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("strengths", self.strengths)
        check_seeds(self.seeds)
        check_at_least(1, epochs=self.epochs)
        if self.protocol == "probe" and (self.layers or self.epochs is not None):
            raise ValueError("layers and epochs belong to --protocol goyal or moco; the probe has neither")


def evaluate_linear(
    run: Path, data: Path, config: LinearConfig = LinearConfig(), *, output: Path | None = None
) -> dict[str, Any]:
    """Accuracy of linear classifiers on a run's frozen features.

    Three protocols, whose numbers are not comparable. probe: takes minutes; L2-regularised logistic regression on
    pooled features of centre crops, solved to its optimum, beside the untrained encoder and raw pixels. goyal: that of
    the PIRL paper; classifiers on pooled maps of conv1 to res5, SGD on augmented images, 28 epochs (ImageNet;
    Places205: --epochs 14, iNaturalist 2018: --epochs 84), each layer and the best. moco: one classifier on the pooled
    features, learning rate 30, 100 epochs.

    Args:
        run: run directory, or a file of weights (a checkpoint, sslfast export, VISSL, PyContrast, MoCo), whose
            results go to FILE.evaluation in place of RUN/evaluation.
        data: folder with train/<class>/ and val/<class>/, or lists, archives or .beton files of these names.
        config: settings.
        output: JSON file to write; default: RUN/evaluation/linear.json, linear-goyal.json or linear-moco.json.

    Under torchrun the processes share the images. goyal and moco resume after the last complete epoch.
    """
    folder = evaluation_folder(run)
    with distributed_device(config.device) as device:
        config = replace(config, device=str(device))
        if config.protocol == "probe":
            path = output or folder / "linear.json"
            evaluation = load_evaluation_set(run, data, config)
            result = linear_result(evaluation, strengths=config.strengths, seeds=config.seeds, device=config.device)
            result = {**result, "config": to_dict(config), "departures": []}
            write_result(result, path)
            return result
        protocol = PROTOCOLS[config.protocol]
        return _evaluate_sgd(run, data, config, protocol, device, output or folder / f"{protocol.name}.json")


def _evaluate_sgd(
    run: Path, data: Path, config: LinearConfig, protocol: SGDProtocol, device: torch.device, output: Path
) -> dict[str, Any]:
    """Train and score the classifiers of a protocol."""
    epochs = protocol.epochs if config.epochs is None else config.epochs
    layers = config.layers or protocol.layers
    unknown = [layer for layer in layers if layer not in protocol.layers]
    if unknown:
        raise ValueError(f"layers of {protocol.name} must be some of {', '.join(protocol.layers)}, got {unknown[0]!r}")
    manifests = load_manifests(data, on_bad_image=config.on_bad_image, decoding=config.decoding(run))
    loaded = load_run(run, prefix=config.prefix, patches=config.patches)
    encoders = trunk_encoders(loaded, config.encoders or (TRAINED,))
    size = loaded.size if config.size is None else config.size
    seen = config.seen(size)
    _, reader = config.readers(manifests, size, seen)
    maps = FrozenMaps(encoders, layers, device=device, precision=resolve_precision(config.precision, device))
    facts = {
        **run_facts(run, loaded, size, seen, [reader.chosen]),
        **protocol.facts(epochs, config.batch_size),
        "loader": config.loader,
        "precision": str(maps.precision).removeprefix("torch."),
        "seeds": list(config.seeds),
        "source": protocol.source,
        "departures": protocol.departures(epochs, config.batch_size, seen, size=(size, 224)),
    }
    name = protocol.full_name(epochs)
    scores: dict[str, list[tuple[float, float]]] = {}
    states, count = [], 0
    for seed in config.seeds:
        resume = ResumeState(
            output.with_name(f"{output.stem}-seed{seed}.partial.pt"),
            {
                **facts,
                "seeds": seed,
                "layers": layers,
                "encoders": tuple(encoders),
                "data": manifests[0].digest(),
                "decoding": asdict(config.decoding(run)),
            },
        )
        states.append(resume)
        images = TrainingImages(
            manifests[0],
            size=size,
            batch_size=config.batch_size,
            seed=seed,
            workers=config.workers,
            on_bad_image=config.on_bad_image,
            device=device,
            loader=config.loader,
        )
        with closing(images):
            heads = train_heads(
                maps,
                images,
                protocol,
                size=size,
                classes=len(manifests[0].classes),
                epochs=epochs,
                batch_size=config.batch_size,
                seed=seed,
                resume=resume,
            )
        found, count = judge(maps, heads, reader, manifests[1])
        for key, pair in found.items():
            scores.setdefault(key, []).append(pair)
    rows = [
        {
            "encoder": key.partition("/")[0],
            "layer": key.partition("/")[2],
            "protocol": f"{name}-{key.partition('/')[2]}",
            **accuracy_row(pairs, count),
        }
        for key, pairs in scores.items()
    ]
    best = {encoder: max((r for r in rows if r["encoder"] == encoder), key=lambda r: r["top1"]) for encoder in encoders}
    result = {
        "protocol": name,
        "config": to_dict(config),
        "results": rows,
        "best": [{**row, "protocol": f"{name}-best-of-{len(layers)}"} for row in best.values()],
        **facts,
        "data": data_facts(data, manifests, [len(manifests[0]), count]),
        "versions": versions(),
    }
    write_result(result, output)
    for resume in states:
        resume.remove()
    return result


def render_table(result: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    return accuracy_table(result) if result["protocol"] == PROBE_PROTOCOL else layer_table(result)
