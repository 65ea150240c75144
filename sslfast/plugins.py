"""Plugins: modules of installed packages that register methods, recipes, logs, networks or image sources, named in the
entry-point group ``sslfast.plugins``::

    [project.entry-points."sslfast.plugins"]
    mine = "my_package.my_methods"

They are imported when a name is asked for that sslfast itself does not have, when all names are listed, and when DATA
is a folder, a URL, or of no kind that sslfast knows.
"""

import importlib.metadata
import sys
from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")

GROUP = "sslfast.plugins"
_found: dict[str, str] | None = None


def load_plugins() -> Mapping[str, str]:
    """Import the plugins of all installed packages, once in a process.

    Returns:
        Plugin -> its package and version, or why it cannot be used. One that fails costs a line on the screen.
    """
    global _found
    if _found is None:
        _found = {}  # a plugin that asks for names while it is imported does not start this again
        for entry in importlib.metadata.entry_points(group=GROUP):
            package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"
            try:
                entry.load()
                _found[entry.name] = package
            except Exception as error:  # a package of somebody else
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                _found[entry.name] = f"{package}, not usable: {reason}"
                print(
                    f"sslfast: plugin {entry.name} of {package} cannot be used ({reason}); correct or uninstall that "
                    "package",
                    file=sys.stderr,
                    flush=True,
                )
    return _found


class PluginDict(dict[str, V]):
    """A table of names that asks the plugins for a name that it lacks. Iterating it shows what is registered so far."""

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        load_plugins()
        return super().__contains__(name)

    def __missing__(self, name: str) -> V:
        load_plugins()
        if super().__contains__(name):
            return self[name]
        raise KeyError(name)
