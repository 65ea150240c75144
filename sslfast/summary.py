"""The screen before the first step: what will run where."""

import torch

from sslfast.checkpoint import checkpoint_step, list_checkpoints
from sslfast.distributed import world_size
from sslfast.loaders import choose_loader
from sslfast.models.decoder import trunk_stride
from sslfast.optim import learning_rate
from sslfast.trainer import Trainer


def summary(trainer: Trainer) -> list[tuple[str, str]]:
    """What ``trainer.fit()`` would do, as (name, value) lines."""
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.method.parameters() if p.requires_grad)
    kept = list_checkpoints(trainer.run.checkpoints)
    start = f"resumes after step {checkpoint_step(kept[-1])}" if kept and trainer.resume == "auto" else "new run"
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU"
    layout = "channels_last" if trainer.channels_last else "contiguous"
    source = "synthetic" if trainer.manifest is None else str(trainer.manifest.source)
    data = f"{source}: {trainer.loader.num_rows:,} images"
    if trainer.manifest is not None and {"train", "val"} <= set(trainer.manifest.classes):
        data += f", those of val too; {source}/train has those of train alone"
    loader: str = config.loader.name
    if loader == "auto":
        loader = "{} ({})".format(*choose_loader(trainer.manifest, trainer.device))
    if trainer.resume not in ("auto", "never"):
        start = f"resumes {trainer.resume}"
    size, needed, free = trainer.checkpoint_bytes(), trainer.disk_bytes(), trainer.run.free_bytes()
    steps = f"{config.epochs:,} epochs x {trainer.steps_per_epoch:,} steps of {config.batch_size:,}"
    steps += f" = {trainer.total_steps:,} steps"
    if trainer.data_pass is not None:
        passes = sum(trainer.method.collects(epoch) for epoch in range(config.epochs))
        steps += f", before {passes:,} of the epochs a pass over the data, forward alone"
    return [
        ("recipe", config.recipe),
        ("method", f"{config.method.name}, {config.model.name}, {parameters / 1e6:.2f} M parameters"),
        ("res5", _res5(trainer)),
        ("data", data),
        ("loader", loader),
        ("device", f"{trainer.device} ({name}), {str(trainer.dtype).removeprefix('torch.')}, {layout}"),
        ("step", _step(trainer)),
        ("steps", steps),
        ("learning rate", _schedule(trainer)),
        ("output", f"{trainer.run.path} ({start})"),
        ("disk", f"{needed / 1e9:.2f} GB for checkpoints of {size / 1e6:.1f} MB, {free / 1e9:.1f} GB free"),
    ]


def _res5(trainer: Trainer) -> str:
    """Cells that the trunk's last stage has of each view."""
    stride = trunk_stride(trainer.config.model)
    words, fewest = [], stride
    for name, view in trainer.config.method.views().items():
        size = view.crop.size if view.jigsaw is None else view.jigsaw.patch_size
        cells = -(-size // stride)
        fewest = min(fewest, cells)
        words.append(f"{cells} x {cells} of {name}{'' if view.jigsaw is None else ' patches'}, {size} px")
    hint = "; 3 x 3 convolutions have one cell there: --model.stem small keeps four times the resolution"
    return "; ".join(words) + (hint if fewest == 1 and trainer.config.model.stem == "imagenet" else "")


def _schedule(trainer: Trainer) -> str:
    optim, scale = trainer.config.optim, trainer.config.batch_size / 256
    peak, final = optim.lr_per_256_images * scale, optim.final_lr_per_256_images * scale
    warmup, epochs = optim.warmup_epochs, trainer.config.epochs
    if warmup >= epochs:
        steps = {"batch_size": trainer.config.batch_size, "steps_per_epoch": trainer.steps_per_epoch}
        last = learning_rate(trainer.total_steps - 1, optim, epochs=epochs, **steps)
        return f"grows to {last:.4g}: the {warmup:g} epochs of warm-up (optim.warmup_epochs) last to the end"
    words = f"{peak:.4g} after {warmup:g} epochs of warm-up" if warmup else f"{peak:.4g}"
    if optim.schedule == "cosine":
        return f"{words} to {final:.4g}, cosine, changes every {optim.lr_update}"
    if optim.schedule == "constant":
        return f"{words}, constant"
    return f"{words}, times {optim.gamma:g} after epochs {', '.join(f'{epoch:g}' for epoch in optim.milestones)}"


def _step(trainer: Trainer) -> str:
    """Who computes which part of a step, and with what."""
    config, ranks = trainer.config, world_size()
    samples = config.batch_size // ranks // config.accumulate_steps
    words = [f"{ranks} process{'es' if ranks > 1 else ''} x {config.accumulate_steps} x {samples} samples"]
    words.append(config.optim.name.upper())
    if config.compile != "off":
        words.append(f"compiled ({config.compile})")
    if config.sync_batchnorm:
        words.append("BatchNorm over all processes")
    if config.on_nonfinite == "skip":
        words.append(f"steps that are not finite are skipped, at most {config.nonfinite_limit} in a row")
    return ", ".join(words)
