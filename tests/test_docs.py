# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The documentation: links and anchors lead somewhere, pages are in the navigation, code blocks parse."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "training_scripts/README.md", *DOCS.rglob("*.md")]
)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Its text without code, in which brackets and # mean something else."""
    return re.sub(r"`[^`\n]+`", "code", BLOCK.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings; mkdocs.yml has the site do the same."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_and_anchors_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_no_page_of_the_site_links_outside_of_it(page):
    if page.is_relative_to(DOCS):
        links = re.findall(r"\]\(([^)\s#]+)", prose(page))
        relative = [link for link in links if not link.startswith("https://")]
        assert all((page.parent / link).resolve().is_relative_to(DOCS) for link in relative)


def test_every_page_is_in_the_navigation():
    # The file has tags of Python, so no YAML reader is asked.
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@each_page
def test_code_blocks_parse(page):
    for _, language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            ast.parse(code)
        if language == "bash":
            checked = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stderr
            assert not re.search(r"<[a-z ]+>", code), "a placeholder that bash takes for a redirection"


@pytest.mark.services
def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api/routers/index.html").read_text()
    # A type out of a docstring, without diffusers' marks.
    assert "torch.LongTensor of shape [num_classes]" in page
    assert "--num_images" in (tmp_path / "cli/index.html").read_text()
