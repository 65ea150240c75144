"""What MkDocs does not do by itself: pages that live outside of docs/, and Sphinx roles in docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README is the first page; CONTRIBUTING, CHANGELOG, examples and measured results are pages too."""
    outside = {name: ROOT / source for name, source in PAGES.items()}
    outside |= {f"benchmarks/results/{path.name}": path for path in (ROOT / "benchmarks/results").iterdir()}
    outside |= {f"examples/{path.name}": path for path in (ROOT / "examples").glob("*.*")}
    for name, path in outside.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links between the root, docs/ and benchmarks/ as they are on the site, where docs/ is the root."""
    if page.file.src_uri in PAGES:
        return re.sub(r"(\]\()docs/", r"\1", markdown)
    return re.sub(r"(\]\()\.\./benchmarks/", r"\1benchmarks/", markdown)


class RolesAsCode(griffe.Extension):
    """``:class:`~sslfast.models.Trunk``` reads as ``Trunk``."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`(?:~(?:[\w.]+\.)?)?([^`]+)`", r"`\1`", obj.docstring.value)
