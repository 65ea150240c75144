from pathlib import Path

import pytest
from PIL import ImageFont

from sslfast.evaluation import lettering
from sslfast.evaluation.lettering import Lettering, font_files, load_font
from sslfast.text import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"),
        ("猫", r"\u732b"),
        ("a猫b", r"a\u732bb"),
        ("emoji😀", r"emoji\U0001f600"),
        ("हि", r"\u0939\u093f"),  # a mark goes with its letter
        ("a\nb\x1b[31m\t", r"a\nb\x1b[31m\t"),
        ("x\u202egnp.exe", r"x\u202egnp.exe"),
        ("\udce9t\udce9", r"\xe9t\xe9"),
    ],
)
def test_without_a_font_names_are_escaped(name: str, shown: str) -> None:
    assert Lettering(fonts=())(name, 12)[0] == shown


def test_a_font_that_has_the_characters_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    found = [path for path in font_files() if path.name == "DejaVuSans.ttf"]
    assert found, "no DejaVu Sans; apt-get install -y fonts-dejavu-core, or pip install matplotlib"
    letters = Lettering(fonts=(Path("/none.ttf"), found[0]))
    for name in ("собака", "زرافة", "café", "cafe\u0301", "Ελλάδα"):
        shown, font = letters(name, 12)
        assert printable(name).replace("e\u0301", "é") == shown
        assert font is load_font(found[0], 12)
    letters.report()
    assert capsys.readouterr().err == ""
    assert letters("собака猫", 12)[0] == r"собака\u732b"
    letters.report()
    letters.report()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert r"猫 (\u732b); install a font that has them" in error


def test_fonts_of_last_resort_have_no_character() -> None:
    for path in font_files():
        if "LastResort" in path.name:
            assert not lettering._has(path, "猫")


def test_direction_and_joining_need_shaping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_has_shaping", lambda: False)
    lettering._has.cache_clear()
    assert Lettering()("زر", 12)[0] == r"\u0632\u0631"
    lettering._has.cache_clear()


@pytest.mark.parametrize("name", ["m" * 5000, "é猫" * 400, "\n" * 900, "e" + "\u0301" * 600, "", "x"])
@pytest.mark.parametrize("keep_end", [False, True])
def test_fitted(name: str, keep_end: bool) -> None:
    shown, font = Lettering().fitted(name, 12, 104, keep_end=keep_end)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert font.getlength(shown) <= 104
    assert shown == name if len(name) < 2 else "..." in shown
