"""Recipes: functions that return a whole TrainConfig, one file per family of methods; and a run from a recipe's name.

``RECIPES`` maps the name on the command line to the function; a plugin adds its own there. Imports ``training`` and
what lies below.
"""

from sslfast.recipes.registry import RECIPES, find_recipe
from sslfast.recipes.run import pretrain
from sslfast.recipes.settings import as_yaml, changed, configure, load_settings

__all__ = ["RECIPES", "as_yaml", "changed", "configure", "find_recipe", "load_settings", "pretrain"]
