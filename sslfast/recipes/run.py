"""``sslfast.pretrain``: a recipe with changed fields, from Python."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from sslfast.config import from_dict, merge, to_dict
from sslfast.data import parse_data
from sslfast.distributed import destroy_process_group
from sslfast.models import choose_trunk
from sslfast.recipes.registry import find_recipe
from sslfast.training import TrainConfig, Trainer, TrainResult


def configure(recipe: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a recipe with some fields changed.

    Args:
        recipe: a name in ``RECIPES``.
        overrides: field name of ``TrainConfig`` -> value; nested fields by dotted name
            (``{"method.num_negatives": 64}``) or as a mapping (``{"method": {"num_negatives": 64}}``). A dataclass
            instance replaces the whole field, so that it may be of another method or trunk.

    Raises:
        ValueError: unknown recipe or field, wrong type, or value out of range; names it with the remedy.
    """
    config = find_recipe(recipe)
    wanted = merge({}, overrides).get("model")
    if isinstance(wanted, Mapping) and not is_dataclass(overrides.get("model")):
        config.model = choose_trunk(config.model, wanted)
    before = to_dict(config)
    values = merge(before, overrides)
    method, new = before["method"].get("name"), values["method"]
    if isinstance(new, Mapping) and new.get("name") != method and not is_dataclass(overrides.get("method")):
        raise ValueError(
            f"config field method.name is {method!r} in recipe {recipe!r} and cannot become {new.get('name')!r}, which "
            "has other fields; choose a recipe of that method"
        )
    return from_dict(type(config), values)


def pretrain(
    data: Any,
    recipe: str,
    output: Path | str,
    *,
    resume: Path | str = "auto",
    **overrides: Any,
) -> TrainResult:
    """Pretrain an encoder without labels; the same as ``sslfast pretrain DATA --recipe RECIPE -o OUTPUT``.

    ::

        import sslfast

        result = sslfast.pretrain("photos", "pirl-small", "runs/a", epochs=2, **{"method.num_negatives": 64})
        trunk = sslfast.load("runs/a")

    A run that was interrupted continues when it is called again. Under ``torchrun`` every process calls it.

    Args:
        data: what ``sslfast pretrain`` takes: a folder of images or of .tar shards, one .tar, a manifest, a .beton
            file, or ``synthetic:N`` (also the number N) for N synthetic images. Also a ``torch.utils.data.Dataset``
            whose items are images or begin with one, without transform.
        recipe: a name in ``sslfast.RECIPES``; sets the values of all fields of
            :class:`sslfast.training.TrainConfig`.
        output: run directory; created if needed.
        resume: ``auto`` (continue from the newest good checkpoint in ``output`` if there is one), ``never`` (refuse an
            ``output`` that holds a run), or the path of a checkpoint or of another run directory.
        overrides: fields of ``TrainConfig`` that differ from the recipe: ``epochs=2``, nested ones by dotted name
            (``**{"model.width": 0.5}``) or as a mapping (``model={"width": 0.5}``). ``init="runs/a"`` starts from
            weights.

    Returns:
        Steps done, last metrics, checkpoint, speed.

    Raises:
        ValueError, FileNotFoundError: something is wrong with a field, the data, the device or the run directory;
            raised before the first step, with the remedy.
        sslfast.training.NonFiniteLossError: the loss became infinite or NaN.
        sslfast.training.CollapseError: all features became the same, with ``on_collapse="error"``.
        sslfast.training.RunInterruptedError: SIGTERM or SIGINT; a checkpoint was saved.
    """
    config = configure(recipe, overrides)
    try:
        return Trainer(config, parse_data(data) if isinstance(data, str) else data, output, resume=resume).fit()
    finally:
        destroy_process_group()
