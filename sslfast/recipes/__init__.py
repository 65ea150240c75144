"""Recipes: functions that return a whole TrainConfig, one file per family of methods.

``RECIPES`` maps the name on the command line to the function. Imports ``training`` and what lies below.
"""

from collections.abc import Callable

from sslfast.recipes import clustering, contrastive, generative, pirl, pretext
from sslfast.recipes.pirl import pirl_small
from sslfast.training import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    **pirl.RECIPES,
    **contrastive.RECIPES,
    **pretext.RECIPES,
    **clustering.RECIPES,
    **generative.RECIPES,
}

__all__ = ["RECIPES", "pirl_small"]
