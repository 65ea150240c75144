"""The table of recipes."""

from collections.abc import Callable

from sslfast.config import nearest
from sslfast.plugins import PluginDict
from sslfast.recipes import clustering, contrastive, generative, joint_embedding, pirl, pretext
from sslfast.training import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = PluginDict(
    {
        **pirl.RECIPES,
        **contrastive.RECIPES,
        **joint_embedding.RECIPES,
        **pretext.RECIPES,
        **clustering.RECIPES,
        **generative.RECIPES,
    }
)
"""Recipe name -> function that returns a new configuration. Add your own: ``RECIPES["name"] = function``; the first
paragraph of the function's docstring is its help text."""


def find_recipe(name: str) -> TrainConfig:
    """A new configuration with the values of the recipe, its ``recipe`` field set to the name.

    Raises:
        ValueError: no such recipe; suggests similar names.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    config = RECIPES[name]()
    config.recipe = name
    return config
