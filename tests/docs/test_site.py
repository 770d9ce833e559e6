"""The site of docs/ builds strictly (broken links and anchors fail), and needs nothing from elsewhere to be read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(r'<(?:script|img|iframe)[^>]* src="?(https?:[^"> ]+)|<link[^>]* href="?(https?:[^"> ]+)')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Not `--quiet`, with which there is nothing that `--strict` counts."""
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_and_every_file_that_pages_link_to_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    assert "not_eligible" in (site / "configs/joint.yaml.html").read_text()
    assert 'href="../recflow.html"' in (site / "benchmarks/index.html").read_text()


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]*))?\)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert not [target for target, _ in links if not (ROOT / target).exists()]
    headings = {t: re.findall(r"^#+ (.*)$", (ROOT / t).read_text(), re.M) for t, anchor in links if anchor}
    slugs = {t: [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in of] for t, of in headings.items()}
    assert not [(target, anchor) for target, anchor in links if anchor and anchor not in slugs[target]]


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched = {str(match) for page in site.rglob("*.html") for match in FETCHED.findall(page.read_text())}
    assert not fetched
