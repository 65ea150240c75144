"""sslfast: fast, exact self-supervised pretraining of image encoders, and the ops it is made of.

``pretrain(data, recipe, output, **overrides)``
    Pretrain an encoder without labels; returns a :class:`sslfast.training.TrainResult`.
``load(path)``
    The trunk of a run, an exported file or another project's checkpoint, in eval mode.
``embed(run, data, **options)``
    Features of any images, with their paths and classes; returns a :class:`sslfast.evaluation.Embeddings`.
``transform(path)``
    From an image to the input of ``load(path)``, as evaluations see it: size, resize rule, mean and deviation.
``RECIPES``
    Recipe name -> function that returns a :class:`sslfast.training.TrainConfig`; add your own.

The ops are in :mod:`sslfast.ops`. Importing ``sslfast`` imports nothing else: each name is imported at its first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslfast.evaluation import embed_all as embed
    from sslfast.evaluation import load_transform as transform
    from sslfast.recipes import RECIPES, pretrain
    from sslfast.weights import load_trunk as load

    __version__: str

__all__ = ["RECIPES", "embed", "load", "pretrain", "transform"]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of the installation; the tag is its only source
        from importlib import metadata

        try:
            return globals().setdefault(name, metadata.version("sslfast"))
        except metadata.PackageNotFoundError:
            return globals().setdefault(name, "0+unknown")
    homes = {
        "RECIPES": ("sslfast.recipes", "RECIPES"),
        "embed": ("sslfast.evaluation", "embed_all"),
        "load": ("sslfast.weights", "load_trunk"),
        "pretrain": ("sslfast.recipes", "pretrain"),
        "transform": ("sslfast.evaluation", "load_transform"),
    }
    if name not in homes:
        raise AttributeError(f"module 'sslfast' has no attribute {name!r}")
    import importlib

    module, attribute = homes[name]
    return globals().setdefault(name, getattr(importlib.import_module(module), attribute))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
