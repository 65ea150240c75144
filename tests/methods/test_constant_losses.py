"""Settings under which a loss is constant are refused before a run."""

from dataclasses import replace

import pytest

from sslfast.methods import MethodContext
from sslfast.recipes import RECIPES

TOO_SMALL = [
    *((recipe, "dimensions") for recipe in ("pirl-paper", "npid", "simclr", "moco-v2", "byol", "swav", "simsiam")),
    ("dino", "bottleneck_features"),
    ("jigsaw", "num_permutations"),
    ("deepcluster", "clusters"),
    ("sela", "clusters"),
    ("swav", "prototypes"),
    ("dino", "dimensions"),
    ("barlow-twins", "dimensions"),
    ("vicreg", "dimensions"),
]


@pytest.mark.parametrize(("recipe", "field"), TOO_SMALL)
def test_one_of_what_must_be_told_apart_is_refused(recipe: str, field: str) -> None:
    """A vector of one number divided by its norm is 1 or -1; one class, cluster or order is always the right one."""
    config = RECIPES[recipe]()
    method = replace(config.method, **{field: 1})
    with pytest.raises(ValueError, match=rf"method\.{field} must be (at least 2|in \[2, \d+\] .*), got 1"):
        method.validate()
    with pytest.raises(ValueError, match=rf"method\.{field} must be "):
        replace(config.method, **{field: 0}).validate()


@pytest.mark.parametrize(("recipe", "least"), [("deepcluster-small", 4), ("sela-small", 2), ("pirl-small", 2)])
def test_fewer_images_than_a_method_can_tell_apart(recipe: str, least: int) -> None:
    config = RECIPES[recipe]()
    context = {"model": config.model, "seed": 0, "steps_per_epoch": 1, "total_steps": 1}
    with pytest.raises(ValueError, match=rf"needs at least {least}.*, got {least - 1}$"):
        config.method.build(MethodContext(num_rows=least - 1, **context))
