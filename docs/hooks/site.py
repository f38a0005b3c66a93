"""Hooks of the website that `make docs` builds; mkdocs.yml names this file.

They add the documents outside `docs/`, the plots, and the OpenAPI document. They turn links between
files of the repository into links between pages. They fail the build if a page loads an asset from
another host.
"""

import json
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# Documents outside docs/ -> their page in the site.
OUTSIDE = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "adapters_store/README.md": "store-format.md",
    "clients/bench/README.md": "bench.md",
    "clients/python/README.md": "client.md",
}
PLOTS = "crma/results/plots"
OPENAPI = ROOT / "build" / "openapi.json"  # where reference/http.md reads it

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FOREIGN_ASSET = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*rel="canonical"))\b[^>]*"""
    r"""\b(?:src|href)=["']?(?:https?:)?//[^>]*>"""
)
NEEDS_A_SCRIPT = re.compile(r'class="mermaid"')  # its script would come from another host
FOREIGN_STYLE = re.compile(r"""(?:url\(|@import\s)["'\s]*(?:https?:)?//""")
FOREIGN = {".html": (FOREIGN_ASSET, NEEDS_A_SCRIPT), ".css": (FOREIGN_STYLE,)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/, the plots and the OpenAPI document."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # mkdocs undoes what is added at import time
    from tables import openapi

    sources = dict(OUTSIDE)
    for plot in (ROOT / PLOTS).glob("*.svg"):
        sources[f"{PLOTS}/{plot.name}"] = f"plots/{plot.name}"
    for source, uri in sources.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    OPENAPI.parent.mkdir(exist_ok=True)
    OPENAPI.write_text(json.dumps(openapi(), indent=1), "utf-8")
    files.append(File.generated(config, "reference/openapi.json", abs_src_path=str(OPENAPI)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    source = {page_uri: path for path, page_uri in OUTSIDE.items()}.get(uri, f"docs/{uri}")

    def site_link(found: re.Match[str]) -> str:
        opening, target, anchor, closing = found.groups()
        linked = _site_uri(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if linked is None:
            return found[0]
        relative = posixpath.relpath(linked, posixpath.dirname(uri) or ".")
        return f"{opening}{relative}{anchor or ''}{closing}"

    return LINK.sub(site_link, markdown)


def _site_uri(path: str) -> str | None:
    """The page or file of the site that shows a file of the repository; None if none does."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith(f"{PLOTS}/"):
        return path.replace(PLOTS, "plots", 1)
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page or a style sheet loads anything from another host."""
    foreign = []
    for file in sorted(Path(config.site_dir).rglob("*")):
        for pattern in FOREIGN.get(file.suffix, ()):
            found = pattern.search(file.read_text("utf-8"))
            if found is not None:
                foreign.append(f"{os.path.relpath(file, config.site_dir)}: {found[0][:120]}")
    if foreign:
        raise PluginError("assets from elsewhere:\n" + "\n".join(foreign))
