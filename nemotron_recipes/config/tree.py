"""Plain nested configs: lay one on another, look at the leaves. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from nemotron_recipes.spec import Tree


def merge(base: Tree, over: Tree) -> Tree:
    """`over` laid on `base`: sections merge, everything else (lists too) replaces. Neither is changed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf. A list is one leaf; an empty section is a leaf too."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves.update(flatten(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves
