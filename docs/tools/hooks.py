"""What MkDocs does not: pages from files beside docs/, notebooks, and links to files of the repository."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Pages whose text stands elsewhere in the repository.
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
PAGE_OF |= {f"examples/{path.name}": f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def version() -> str:
    """Return the version, which is written in one place."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "fastmtl" / "__init__.py").read_text(), re.MULTILINE)[1]


def on_config(config: MkDocsConfig) -> None:
    """Show the version at the foot of each page."""
    config.copyright = f"fastmtl {version()}, MIT licence"


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the pages that stand elsewhere, and the notebooks."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for notebook in NOTEBOOKS:
        text, images = rendered(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, image in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=image))

    for file in list(files.documentation_pages()):
        for link, _ in _LINK.findall(file.content_string):
            target = repository_path(link, file)
            if target is not None and target not in PAGE_OF and not target.startswith("docs/"):
                add_copy(ROOT / target, f"repository/{target}", config, files)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to files of the repository lead to their pages, or to copies of them in the site."""

    def moved(found: re.Match[str]) -> str:
        target = repository_path(found[1], page.file)
        if target is None:
            return found[0]
        in_site = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        place = PAGE_OF.get(target, in_site)
        if (ROOT / target).is_dir():
            place += "/index.md"
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".") + (found[2] or "")

    return _LINK.sub(moved, markdown)


def repository_path(link: str, file: File) -> str | None:
    """Return the file of the repository that a link of a page leads to; None for files that only the site has."""
    source = ELSEWHERE.get(file.src_uri, f"docs/{file.src_uri}")
    if file.src_uri.startswith("notebooks/"):
        source = f"examples/{file.name}.ipynb"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return target if (ROOT / target).exists() else None


def add_copy(path: Path, place: str, config: MkDocsConfig, files: Files) -> None:
    """Add a file of the repository to the site; a folder becomes a page that lists copies of its files."""
    if path.is_dir():
        inside = sorted(child for child in path.iterdir() if child.is_file() and not child.name.startswith("."))
        for child in inside:
            add_copy(child, f"{place}/{child.name}", config, files)
        listing = "".join(f"- [{child.name}]({child.name})\n" for child in inside)
        place, content = f"{place}/index.md", f"# {path.relative_to(ROOT)}\n\n{listing}"
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=content))
    elif files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, content=path.read_bytes()))


def rendered(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, with the outputs that are stored in it, and its images by name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(shown(output, notebook.stem, images))
    return "\n\n".join(parts) + "\n", images


def shown(output: dict[str, Any], stem: str, images: dict[str, bytes]) -> str:
    """Return one output of a cell as Markdown; an image is added to ``images``."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(images) + 1}.png"
        images[name] = base64.b64decode(data["image/png"])
        return f"![figure]({name})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"
