"""Recipes: functions that return a whole TrainConfig, one file per family of methods.

``RECIPES`` maps the name on the command line to the function; a plugin adds its own there. Imports ``training`` and
what lies below.
"""

from collections.abc import Callable

from sslfast.recipes import clustering, contrastive, generative, pirl, pretext
from sslfast.training import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    **pirl.RECIPES,
    **contrastive.RECIPES,
    **pretext.RECIPES,
    **clustering.RECIPES,
    **generative.RECIPES,
}

__all__ = ["RECIPES"]
