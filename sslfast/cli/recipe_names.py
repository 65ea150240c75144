"""Names of the recipes, so that a wrong one is found before the seconds that importing torch takes."""

from sslfast.config import nearest

RECIPE_NAMES = (
    "pirl-paper",
    "pirl-vissl",
    "pirl-mlp-blur",
    "pirl-rotation",
    "pirl-rotation-jigsaw",
    "npid",
    "npid-plus-plus",
    "pirl-small",
    "npid-small",
    "demo",
    "moco-v1",
    "moco-v2",
    "simclr",
    "simclr-vissl",
    "cpc",
    "moco-v1-small",
    "moco-v2-small",
    "simclr-small",
    "cpc-small",
    "byol",
    "simsiam",
    "barlow-twins",
    "vicreg",
    "swav",
    "dino",
    "byol-small",
    "simsiam-small",
    "barlow-twins-small",
    "vicreg-small",
    "swav-small",
    "dino-small",
    "jigsaw",
    "jigsaw-small",
    "rotation",
    "rotation-small",
    "relative-position",
    "relative-position-doersch",
    "relative-position-small",
    "deepcluster",
    "deepcluster-small",
    "sela",
    "sela-aug",
    "sela-small",
    "autoencoder",
    "colorization",
    "super-resolution",
    "inpainting",
    "autoencoder-small",
    "colorization-small",
    "super-resolution-small",
    "inpainting-small",
)
"""The keys of ``sslfast.RECIPES`` without plugins, in their order; a test compares the two."""


def option_value(arguments: list[str], option: str) -> str | None:
    """The value of an option that decides which other options exist; the last one given, or None."""
    value: str | None = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def check_recipe(arguments: list[str], command: str) -> None:
    """ValueError where ``--recipe`` is missing, or names none of :data:`RECIPE_NAMES`."""
    name = option_value(arguments, "--recipe")
    if name is None and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"--recipe is missing; sslfast {command} DATA --recipe {'|'.join(RECIPE_NAMES)}")
    if name is not None and name not in RECIPE_NAMES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPE_NAMES)}")
