"""``--plugin MODULE``: a user's own module, imported before anything else is parsed."""

import importlib
import sys


def import_plugins(arguments: list[str]) -> list[str]:
    """Import the modules that ``--plugin`` names, in their order; returns the other arguments.

    A module registers what it adds: ``sslfast.methods.register_method``, ``sslfast.RECIPES["name"] = function``.
    The current directory is searched last, so that a file in it never hides an installed package. It stays on
    ``sys.path``, from which loader processes import the module again.

    Raises:
        ValueError: no module is named, it does not exist, or importing it fails.
    """
    rest: list[str] = []
    names: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, name = argument.partition("=")
        if option == "--plugin":
            names.append(name if equals else next(remaining, ""))
        else:
            rest.append(argument)
    if not {"", "."} & set(sys.path):
        sys.path.append("")
    for name in names:
        if not name or name.startswith(("-", ".")):
            raise ValueError("--plugin needs the name of a module, for example --plugin my_methods for my_methods.py")
        try:
            importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                raise ValueError(
                    f"--plugin {name}: no such module; run the command in the folder of {name.split('.')[0]}.py, "
                    "or install the module"
                ) from None
            raise ValueError(
                f"--plugin {name}: importing it failed: {type(error).__name__}: {error}; correct the module "
                "(SSLFAST_TRACEBACK=1 shows where)"
            ) from error
    return rest
