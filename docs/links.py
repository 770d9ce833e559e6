"""What the site adds to docs/: the pages and files outside of it that pages link to, so that links work as on GitHub.

The site's tree is the repository's with docs/ lifted to the top. A linked Markdown file is a page, any other file is
shown on a page of its own.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "configs/README.md")  # pages all the same
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/ and is linked to."""
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    pages |= {path: (ROOT / path).read_text() for path in OUTSIDE}
    linked = {target for path, text in pages.items() for target in _targets(path, text)}
    for target in sorted({*linked, *OUTSIDE}):
        if not target.startswith("docs/") and (ROOT / target).is_file():
            text = pages.get(target) or _shown(target)
            files.append(File.generated(config, _place(target), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from the file's place in the repository to the target's place on the site."""
    uri = page.file.src_uri
    here = uri if page.file.generated_by else f"docs/{uri}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        return posixpath.relpath(_place(target), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


def _targets(path: str, text: str) -> Iterator[str]:
    for match in LINK.finditer(text):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))


def _place(target: str) -> str:
    """Where a file of the repository is on the site."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return target if target.endswith(".md") else f"{target}.md"


def _shown(target: str) -> str:
    """A page that shows a file as it is."""
    return f"# {target}\n\n~~~~{LANGUAGES.get(Path(target).suffix, 'text')}\n{(ROOT / target).read_text()}~~~~\n"
