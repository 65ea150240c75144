"""``sslfast.pretrain``: a recipe with changed fields, from Python."""

from pathlib import Path
from typing import Any

from sslfast.data import parse_data
from sslfast.distributed import destroy_process_group
from sslfast.recipes.settings import changed, configure, load_settings
from sslfast.report import draw_pictures
from sslfast.training import Trainer, TrainResult


def pretrain(
    data: Any,
    recipe: str | None,
    output: Path | str,
    *,
    config: Path | str | None = None,
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
            :class:`sslfast.training.TrainConfig`. None: ``config`` names it.
        output: run directory; created if needed.
        config: file of settings (.yaml, .toml, .json), or a run directory for a new run with the same settings.
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
    if config is None:
        if recipe is None:
            raise ValueError("recipe is None; name a recipe of sslfast.RECIPES, or a file with config=")
        settings = configure(recipe, overrides)
    else:
        settings = changed(load_settings(config, recipe), overrides)
    try:
        images = parse_data(data) if isinstance(data, str) else data
        return Trainer(settings, images, output, resume=resume, draw=draw_pictures).fit()
    finally:
        destroy_process_group()
