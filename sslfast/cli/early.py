"""What is wrong with a command line and can be said without torch, whose import takes seconds: a path that does not
exist, a recipe or an option that there is not.

``known_options.txt`` lists every option; ``python -m sslfast.cli.completion FILE`` writes it anew.
Its lines: the words of a command, or ``recipe NAME...``, a colon, and its options, for recipes those of method and
trunk.
"""

import os
import pkgutil
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from sslfast.files import reason_of

TABLE = Path(__file__).with_name("known_options.txt")
HELP = TABLE.with_name("known_help.txt")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_NAMED = re.compile(r"--[A-Za-z]")


def check_path(path: str, name: str) -> None:
    """ValueError where an argument is a path that cannot be read; nothing for URLs and ``synthetic:N``.

    Args:
        path: the argument.
        name: of the argument, for the message.
    """
    if _URL.match(path) or path.startswith("synthetic:"):
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        link = f" (it is a link to {os.readlink(path)})" if os.path.islink(path) else ""
        raise ValueError(f"{path} does not exist{where}{link}: correct the path of {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path} cannot be read ({reason}): correct the path of {name}, or its permissions") from None
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise ValueError(f"{path} cannot be read (Permission denied): change its permissions (chmod -R u+rX)")


def show_help(words: Sequence[str], arguments: Sequence[str]) -> bool:
    """Print the help of a command; False where that depends on more than the command: a recipe, plugins.

    ``known_help.txt`` holds the texts; what writes ``known_options.txt`` writes it too. Once torch is imported the
    command's own help is as fast.
    """
    before = [*arguments, "--"]
    before = before[: before.index("--")]
    depends = {"--recipe", "--config", "--model.name", "--model.factory"} & {word.partition("=")[0] for word in before}
    if "torch" in sys.modules or not {"-h", "--help"} & set(before) or depends:
        return False
    try:
        _, mark, text = _text(HELP).partition(f"= {' '.join(words)}\n")
    except OSError:
        return False
    if not mark or (words[0] in ("pretrain", "preview") and _has_plugins()):
        return False
    from sslfast.cli.helptext import render

    print(render(text.partition("\n= ")[0], sys.stdout), end="")
    return True


def check_options(words: Sequence[str], arguments: Sequence[str]) -> None:
    """ValueError for a recipe or an option that there is not; the command itself checks the rest.

    Nothing where that depends on more than the command line: settings of a file, a trunk by name, plugins. Nothing
    either once torch is imported, for then the command's own check is as fast.

    Args:
        words: of the command.
        arguments: behind them.
    """
    if "torch" in sys.modules or {"-h", "--help"} & set(arguments):
        return
    named = [(word.partition("=")[0].replace("_", "-"), word) for word in arguments if _NAMED.match(word)]
    table = _read()
    known = table.get(" ".join(words))
    if known is None:
        return
    if "--recipe" in known:
        values = [
            after if word == "--recipe" else word.partition("=")[2]
            for word, after in zip(arguments, [*arguments[1:], ""], strict=True)
            if word.partition("=")[0] == "--recipe"
        ]
        depends = words[0] in ("pretrain", "preview")  # its options on the recipe
        if (depends and not values) or {"--config", "--model.name", "--model.factory"} & {name for name, _ in named}:
            return
        recipes = {
            name: options for line, options in table.items() if line[:7] == "recipe " for name in line.split()[1:]
        }
        if values and values[-1] not in recipes:
            if not _has_plugins():
                from sslfast.config import nearest

                raise ValueError(f"unknown recipe {values[-1]!r}; {nearest(values[-1], recipes)}")
            return
        if depends:
            known = [*known, *recipes[values[-1]]]
    for name, word in named:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"`sslfast {' '.join(words)} --help` lists the options"
            )
            raise ValueError(f"unknown option {word.partition('=')[0]}; {hint}")


def _text(path: Path) -> str:
    """A file of this package, which may be an archive. Raises OSError."""
    return (pkgutil.get_data("sslfast.cli", path.name) or b"").decode("utf-8")


def _read() -> dict[str, list[str]]:
    try:
        text = _text(TABLE)
    except OSError:
        return {}
    lines = (line.partition(": ") for line in text.splitlines())
    return {words: options.split() for words, _, options in lines}


def _has_plugins() -> bool:
    from importlib.metadata import entry_points

    from sslfast.plugins import GROUP

    return bool(entry_points(group=GROUP))
