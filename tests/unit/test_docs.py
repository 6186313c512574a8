"""What the documents claim to list, they list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemotron_recipes.backends import REGISTRY, get_backend

ROOT = Path(__file__).parents[2]
TRAINING = [name for name in sorted(REGISTRY) if "train" in get_backend(name).kinds]


@pytest.mark.parametrize("name", TRAINING)
def test_the_documented_mapping_is_the_backends_own(name: str) -> None:
    text = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    section = next(part for part in text.split("\n## ") if f"(`backend={name}`)" in part)
    documented = set(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|", section, re.MULTILINE))
    backend = get_backend(name)
    assert documented == {pair for method in backend.methods for pair in backend.table(method).items()}


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
