"""Relative links of the Markdown files: the file is there, and has the heading that an anchor names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def prose(page):
    return re.sub(r"^(```|~~~).*?^\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page):
    """Anchors as GitHub makes them: lower case, words joined by hyphens, a number behind the second of a name."""
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text(encoding="utf-8")))
    seen = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = seen[name] = seen.get(name, -1) + 1
        found.add(f"{name}-{number}" if number else name)
    return found


def broken(page):
    """Returns the links of a page that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "`code`", prose(page))
    bad = []
    for link in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_anchors_lead_somewhere(page):
    assert not broken(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n\n## Same\n\n## Same\n\n[a](#one-two-three) [b](#same-1) [c](page.md#same) [d](https://x.y/z)\n"
        "[e](#same-2) [f](other.md) [g](page.md#none) `[h](code.md)`\n```\n[i](code.md)\n```\n"
    )
    assert broken(page) == ["#same-2", "other.md", "page.md#none"]
