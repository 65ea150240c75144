"""Every recipe says where its values are from and where it departs; numbers stand in one place."""

import re
from pathlib import Path

import pytest

from sslfast.recipes import RECIPES
from sslfast.recipes.published import METHODS, PUBLISHED, main, replaced, table
from sslfast.report.published import PUBLISHED as FIGURE

PAGE = Path(__file__).resolve().parents[2] / "docs/recipes.md"
LARGE = sorted(name for name in RECIPES if name != "demo" and not name.endswith("-small"))


def paragraphs(name: str) -> list[str]:
    return [" ".join(part.split()) for part in (RECIPES[name].__doc__ or "").split("\n\n")]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_names_its_sources_and_its_departures(name: str) -> None:
    found = paragraphs(name)
    assert sum(part.startswith("Departures: ") for part in found) == 1, found
    assert not any("eparture" in part for part in found if not part.startswith("Departures: ")), found
    sources = [part for part in found if re.search(r"\b[Ff]rom |Chosen here", part) and "Departures" not in part]
    assert sources or re.search(r"section|table", found[0]), found


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_number_has_a_source_and_is_of_the_recipes_epochs(name: str) -> None:
    numbers = PUBLISHED[name]
    for number in numbers:
        assert 0 < number.top1 < 100
        assert re.search(r"table|section|appendix|\.md|\.yml", number.source), number
    config = RECIPES[name]()
    assert {number.epochs for number in numbers} & {config.epochs, None}, (name, config.epochs)
    assert config.recipe == name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_docstring_repeats_a_published_number(name: str) -> None:
    text = RECIPES[name].__doc__ or ""
    assert not re.search(r"\d\.\d+ ?%", text), text
    for number in PUBLISHED.get(name, ()):
        assert not re.search(rf"(?<![\d.]){re.escape(f'{number.top1:g}')}(?![\d])", text), number


def test_every_recipe_is_in_one_row() -> None:
    listed = [name for names, _ in METHODS for name in names]
    assert sorted(listed) == LARGE
    assert set(PUBLISHED) <= set(listed)


def test_the_table_of_the_readme_is_the_generated_one(tmp_path: Path) -> None:
    """If not: python -m sslfast.recipes.published docs/recipes.md"""
    assert table(RECIPES) in PAGE.read_text()
    copy = tmp_path / "recipes.md"
    text = PAGE.read_text()
    copy.write_text(text.replace(table(RECIPES), table(RECIPES).splitlines()[0] + "\n| old |"))
    main(copy)
    assert copy.read_text() == text
    with pytest.raises(ValueError, match=r"there is no line '. recipe . what .*to put the table of methods at"):
        replaced("# A page\n", RECIPES)


def test_the_page_has_the_same_numbers_in_the_table_of_results_to_match() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ImageNet linear, ")]
    by_row = {cells[0].strip(): [cell.strip() for cell in cells[2:]] for cells in rows}
    of_the_paper = [
        next(f"{number.top1}" for number in PUBLISHED[name] if number.source.startswith("Misra"))
        for name in ("pirl-paper", "npid-plus-plus", "jigsaw", "rotation", "pirl-rotation", "pirl-rotation-jigsaw")
    ]
    assert by_row["ImageNet linear, top-1"] == of_the_paper[:4]
    assert by_row["ImageNet linear, 400 epochs, 4,096 negatives"][0].split("; ")[1:] == of_the_paper[4:]


def test_the_figure_of_reports_has_the_same_numbers() -> None:
    drawn = {point.method: point.top1 for point in FIGURE}
    recipes = {"PIRL": "pirl-paper", "NPID": "npid", "NPID++": "npid-plus-plus", "MoCo": "moco-v1"}
    for method, recipe in {**recipes, "Jigsaw": "jigsaw", "Rotation": "rotation"}.items():
        assert drawn[method] in [number.top1 for number in PUBLISHED[recipe]], method


def test_numbers_are_printed_as_their_source_has_them() -> None:
    shown = [str(number) for name in ("npid", "sela", "deepcluster", "simclr") for number in PUBLISHED[name]]
    assert shown == [
        "54.0 (200 epochs)",
        "61.5 (400 epochs, pre-activation ResNet-50)",
        "46.92 (200 epochs, with Sobel input)",
        "57.71 (200 epochs, with Sobel input, best layer)",
        "69.1",
    ]
