"""What is shown and checked before the first step: the plan of the run, and the memory that a step needs."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.data import sample_contents
from sslfast.distributed import world_size
from sslfast.loaders import choose_loader
from sslfast.methods import BatchSplit
from sslfast.models import LibraryTrunk, ResNetConfig, size_words, trunk_name, trunk_stride
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from sslfast.views import View, ViewConfig


def summary(trainer: Trainer) -> list[tuple[str, str]]:
    """The plan of ``trainer.fit()`` as (name, value) lines."""
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.method.parameters() if p.requires_grad)
    kept = trainer.store.list()
    start = f"resumes after step {kept[-1]}" if kept and trainer.resume == "auto" else "new run"
    start += "" if trainer.initial is None else f" from {config.init}"
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU"
    layout = "channels_last" if trainer.channels_last else "contiguous"
    source = "synthetic" if trainer.manifest is None else str(trainer.manifest.source)
    data = f"{source}: {trainer.loader.num_rows:,} images"
    if trainer.manifest is not None and {"train", "val"} <= set(trainer.manifest.classes):
        data += f", val included; for train alone give {source}/train"
    loader: str = config.loader.name
    if loader == "auto":
        loader = "{} ({})".format(*choose_loader(trainer.manifest, trainer.device))
    if trainer.resume not in ("auto", "never"):
        start = f"resumes {trainer.resume}"
    saver, free = trainer.saver, trainer.run.free_bytes()
    size, needed = saver.checkpoint_bytes(), saver.disk_bytes(trainer.total_steps)
    steps = f"{config.epochs:,} epochs x {trainer.steps_per_epoch:,} steps of {config.batch_size:,}"
    steps += f" = {trainer.total_steps:,} steps"
    if trainer.feature_pass is not None:
        passes = sum(trainer.method.needs_feature_pass(epoch) for epoch in range(config.epochs))
        steps += f", with a feature pass over the data before {passes:,} of the epochs"
    suspicious = [] if trainer.manifest is None else sample_contents(trainer.manifest).warnings("--loader.white-level")
    return [
        ("recipe", config.recipe),
        ("method", f"{config.method.name}, {config.model.name}, {parameters / 1e6:.2f} M parameters"),
        ("res5", _res5(trainer)),
        ("data", data),
        *(("left out", line) for line in ([] if trainer.manifest is None else trainer.manifest.left_out())),
        *(("classes", line) for line in ([] if trainer.manifest is None else trainer.manifest.class_remarks())),
        *(("pixels", f"of a sample: {line}") for line in suspicious),
        ("loader", loader),
        ("device", f"{trainer.device} ({name}), {str(trainer.dtype).removeprefix('torch.')}, {layout}"),
        ("step", _step(trainer)),
        *(("note", line) for line in config.method.remarks(_split(config))),
        ("steps", steps),
        ("learning rate", _schedule(trainer)),
        ("output", f"{trainer.run.path} ({start})"),
        ("disk", f"{needed / 1e9:.2f} GB for checkpoints of {size / 1e6:.1f} MB, {free / 1e9:.1f} GB free"),
        ("checkpoints", saver.kind),
    ]


def _res5(trainer: Trainer) -> str:
    """Spatial size of the trunk's last stage for each view."""
    trunk, method, model = trainer.method.trunk, trainer.config.method, trainer.config.model
    if isinstance(trunk, LibraryTrunk):
        shown = ", ".join(f"{size} px ({names})" for size, names in size_words(method.trunk_sizes()).items())
        rates = "; its dropout and stochastic depth are off" if trunk.has_random_layers else ""
        return f"not a ResNet: {trunk.out_features:,} features of images of {shown}{rates}"
    if not isinstance(model, ResNetConfig):
        return f"unknown: {trunk_name(model)} is not a ResNet"
    stride = trunk_stride(model)
    sizes, smallest = [], stride
    for name, view in method.views().items():
        size = view.crop.size if view.jigsaw is None else view.jigsaw.patch_size
        cells = -(-size // stride)
        smallest = min(smallest, cells)
        sizes.append(f"{cells} x {cells} of {name}{'' if view.jigsaw is None else ' patches'}, {size} px")
    hint = "; 3 x 3 convolutions see one cell there: --model.stem small keeps four times the resolution"
    return "; ".join(sizes) + (hint if smallest == 1 and model.stem == "imagenet" else "")


def _schedule(trainer: Trainer) -> str:
    rate = trainer.learning_rate
    if rate.warmup >= rate.epochs:
        last = rate(trainer.total_steps - 1)
        return f"grows to {last:.4g}: the {rate.warmup:g} epochs of warm-up (optim.warmup_epochs) last to the end"
    start = f"{rate.peak:.4g}" + (f" after {rate.warmup:g} epochs of warm-up" if rate.warmup else "")
    if rate.shape == "cosine":
        return f"{start} to {rate.final:.4g}, cosine, changes every {rate.update}"
    if rate.shape == "constant":
        return f"{start}, constant"
    return f"{start}, times {rate.gamma:g} after epochs {', '.join(f'{epoch:g}' for epoch in rate.milestones)}"


def _split(config: TrainConfig) -> BatchSplit:
    return BatchSplit(
        batch_size=config.batch_size,
        ranks=world_size(),
        accumulate_steps=config.accumulate_steps,
        sync_batchnorm=config.sync_batchnorm,
    )


def _step(trainer: Trainer) -> str:
    """How a step is split over processes and micro-batches, and its options."""
    config, ranks = trainer.config, world_size()
    samples = config.batch_size // ranks // config.accumulate_steps
    parts = [f"{ranks} process{'es' if ranks > 1 else ''} x {config.accumulate_steps} x {samples} samples"]
    parts.append(config.optim.name.upper())
    if config.optim.clip_grad_norm:
        whose = "of each parameter " if config.optim.clip_each else ""
        parts.append(f"gradient norm {whose}at most {config.optim.clip_grad_norm:g}")
    if config.compile != "off":
        parts.append(f"compiled ({config.compile})")
    if config.sync_batchnorm:
        parts.append("BatchNorm over all processes")
    if config.on_nonfinite == "skip":
        parts.append(f"steps that are not finite are skipped, at most {config.nonfinite_limit} in a row")
    return ", ".join(parts)


def estimate_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes on one device by purpose.

    Parameters, gradients, momentum and the other state (bank, queues, BatchNorm) are counted; so are the views of a
    micro-batch and, on CUDA, those of the next. Activations are what autograd saves in a forward on the ``meta``
    device, where nothing is computed; half of it under bf16. The key "activations" is absent where a method's forward
    cannot run there. Not counted: kernel workspaces, fragmentation of the allocator and the CUDA context, together
    about a fifth more. ``trainer`` cannot be used for training afterwards.
    """
    method, config = trainer.method, trainer.config
    parameters = [p for p in method.parameters() if p.requires_grad]
    momenta = [v for values in trainer.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    needs = {
        "parameters": _bytes(list(method.parameters())),
        "gradients": _bytes(parameters),
        "momentum": _bytes(momenta),
        "bank and other state": _bytes(list(method.buffers())),
    }
    if config.on_nonfinite == "skip":
        needs["copy for on_nonfinite=skip"] = needs["parameters"] + needs["momentum"] + needs["bank and other state"]
    samples = config.batch_size // world_size() // config.accumulate_steps
    views = {name: _meta_view(view, samples, trainer.dtype) for name, view in trainer.stage.views.items()}
    pixels = sum(view.pixels.nbytes for view in views.values())
    needs["views"] = pixels * (2 if trainer.device.type == "cuda" else 1)
    kept = _saved_bytes(trainer, views, samples)
    if kept is not None:
        needs["activations"] = kept * trainer.dtype.itemsize // torch.float32.itemsize
    return needs


def device_bytes(device: torch.device) -> int:
    """Total memory of a device; for the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(trainer: Trainer) -> str:
    """The estimate as a line. Raises ValueError where the device has less memory."""
    needs, available = estimate_memory(trainer), device_bytes(trainer.device)
    total = sum(needs.values())
    items = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in needs.items())
    if "activations" not in needs:
        items += ", activations unknown"
    line = f"about {total / 1e9:.2f} GB of {available / 1e9:.1f} GB ({items})"
    if total > available:
        raise ValueError(
            f"a step needs {line} on {trainer.device}; raise accumulate_steps, lower batch_size, or use more processes"
        )
    return line


def _saved_bytes(trainer: Trainer, views: dict[str, View], samples: int) -> int | None:
    """Bytes of distinct storages that autograd saves in a forward, without those of parameters and buffers."""
    method = trainer.method.train()
    state = {name: value.to("meta") for name, value in (*method.named_parameters(), *method.named_buffers())}
    for name, parameter in method.named_parameters():
        state[name].requires_grad_(parameter.requires_grad)
    own = {_storage(value) for value in state.values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    inputs = {
        name: View(pixels=v.pixels.float(), permutation=v.permutation, quarter_turns=v.quarter_turns)
        for name, v in views.items()
    }
    sample_ids = torch.zeros(samples, dtype=torch.int64, device="meta")
    step = torch.zeros((), dtype=torch.int64, device="meta")
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            torch.func.functional_call(method, state, (inputs, sample_ids), {"step": step})
    except Exception:  # a method may read values, which a meta tensor does not have
        return None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _meta_view(view: ViewConfig, samples: int, dtype: torch.dtype) -> View:
    options: dict[str, Any] = {"device": "meta"}
    size, jigsaw = view.crop.size, view.jigsaw
    shape = [samples, 3, size, size]
    if jigsaw is not None:
        shape = [samples, jigsaw.grid**2, 3, jigsaw.patch_size, jigsaw.patch_size]
    cells = torch.zeros(shape[:2], dtype=torch.int64, **options) if jigsaw is not None else None
    turns = torch.zeros(samples, dtype=torch.int64, **options) if view.rotation else None
    return View(pixels=torch.empty(shape, dtype=dtype, **options), permutation=cells, quarter_turns=turns)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
