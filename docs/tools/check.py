"""Looks at the built site: every public name is in the reference, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

from docstrings import anchor

ROOT = Path(__file__).resolve().parents[2]
# Where a page makes the browser load what it names.
LOADED = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio"), "src") | {"object": "data"}


class Loads(HTMLParser):
    """Collects what a page loads, links apart, which a reader has to click on."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the address that an element loads."""
        named = dict(attrs)
        address = named.get("href") if tag == "link" else named.get(LOADED.get(tag, ""))
        self.urls += [address] if address else []


def loaded_from_elsewhere(site: Path) -> list[str]:
    """Return the addresses outside of the site that its pages and style sheets load."""
    found = []
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text())
        found += [f"{page.relative_to(site)} loads {url}" for url in loads.urls if re.match(r"(?:[a-z]+:)?//", url)]
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(['\"]?|@import\s+['\"])((?:https?:)?//[^)'\"]+)", sheet.read_text())
        found += [f"{sheet.relative_to(site)} loads {url}" for url in urls]
    return found


def names_in_reference(site: Path) -> set[str]:
    """Return the names that have a place in the reference, from Sphinx's inventory of it."""
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    return {line.split(" ", 1)[0] for line in lines}


def public_names() -> set[str]:
    """Return the public names, without the methods of classes."""
    text = (ROOT / "tests" / "public_api.txt").read_text()
    classes = set(re.findall(r"^([\w.]+)\(", text, re.MULTILINE))
    names = set(re.findall(r"^[\w.]+", text, re.MULTILINE)) - {"fastmtl.__version__"}
    return {name for name in names if name.rpartition(".")[0] not in classes}


def problems(site: Path) -> list[str]:
    """Return what is wrong with a site, a sentence each."""
    there = names_in_reference(site)
    missing = sorted(name for name in public_names() if anchor(name) not in there)
    found = [f"{name} is public and not in the reference" for name in missing]
    found += loaded_from_elsewhere(site)
    index = (site / "search" / "search_index.js").read_text()
    if '"title":"PCGrad"' not in index:
        found.append("search does not find PCGrad")
    return found


if __name__ == "__main__":
    complaints = problems(Path(sys.argv[1]))
    print("\n".join(complaints) or "the site is whole, and loads nothing from elsewhere")
    sys.exit(bool(complaints))
