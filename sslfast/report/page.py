"""The page around the report's sections: one self-contained file with style and script embedded."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from sslfast.text import printable


def text(words: object) -> str:
    """Words as the content of an element or of a quoted attribute: markup, control characters, undecodable bytes and
    changes of direction are shown, not obeyed. Everything that others named goes through here."""
    return escape(printable(str(words)), quote=True)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document; sections are (heading, HTML), empty ones are omitted."""
    style, script = (files("sslfast.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    body = "".join(f"<section><h2>{text(heading)}</h2>{html}</section>" for heading, html in sections if html)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style></head><body><main><h1>{text(title)}</h1>"
        f'<div class="faint">{text(subtitle)}</div>{body}</main><script>{script}</script></body></html>\n'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str | float]], *, html: bool = False) -> str:
    """A table that scrolls horizontally on narrow screens; numbers are right-aligned. ``html``: cells are HTML."""
    shown = (lambda t: t) if html else text
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]

    def cell(tag: str, value: str | float, right: bool) -> str:
        words = shown(value) if isinstance(value, str) else f"{value:,.6g}"
        return f"<{tag}{' class=n' if right else ''}>{words}</{tag}>"

    head = "".join(cell("th", name, right) for name, right in zip(header, numeric, strict=True))
    lines = "".join(
        "<tr>" + "".join(cell("td", value, right) for value, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def legend(names: Sequence[str]) -> str:
    """Run names in the colours of their lines."""
    return (
        '<div class="legend">'
        + "".join(f'<span class="s{i % 8}"><b>{text(name)}</b></span>' for i, name in enumerate(names))
        + "</div>"
    )
