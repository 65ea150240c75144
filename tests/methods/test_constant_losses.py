"""Settings under which a loss is constant are refused before a run."""

from dataclasses import replace

import pytest

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
