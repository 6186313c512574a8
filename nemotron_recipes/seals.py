"""JSON documents and lines that carry a digest of themselves: a changed byte is noticed before anything is used.

A document says twice that it is sealed: `sealed` is the digest of the rest, `sealed_as` the kind of document, which the
digest covers. So no single change can pass it off as one that never had a seal. Documents without either are taken as
they are: they come from a version that did not seal, or from people. Standard library only.
"""

from __future__ import annotations

import json
import re

from nemotron_recipes.spec import Tree, sha256_text

SEAL, KIND, LINE_SEAL = "sealed", "sealed_as", "sum"
_SORTED = json.JSONEncoder(sort_keys=True)
_LINE_SEAL = re.compile("[0-9a-f]{12}")
CHANGED = "it isn't what was written"


def digest(tree: Tree) -> str:
    """Of the values, however they are laid out in the file."""
    return sha256_text(_SORTED.encode(tree))


def sealed(tree: Tree, kind: str) -> Tree:
    """The document with its seal."""
    whole = {**tree, KIND: kind}
    return {**whole, SEAL: digest(whole)}


def opened(tree: Tree) -> Tree:
    """The document without its seal. ValueError: the seal does not fit, or it is no JSON object."""
    if not isinstance(tree, dict):
        raise ValueError("it is no JSON object")
    found = tree.pop(SEAL, None)
    if (found is not None or KIND in tree) and found != digest(tree):
        raise ValueError(CHANGED)
    tree.pop(KIND, None)
    return tree


def sealed_line(tree: Tree) -> str:
    """One line of JSON, its seal last."""
    text = json.dumps(tree, ensure_ascii=True)
    return f'{text[:-1]}, "{LINE_SEAL}": "{_short(text)}"}}\n'


def opened_line(line: str) -> tuple[Tree, bool]:
    """The tree, and whether the line has a seal. ValueError: it is no JSON object, or its seal does not fit.

    A number of that name, or another text, is no seal but a field: metrics have names of their own.
    """
    tree = json.loads(line)
    if not isinstance(tree, dict):
        raise ValueError("it is no JSON object")
    found = tree.get(LINE_SEAL)
    if not (isinstance(found, str) and _LINE_SEAL.fullmatch(found)):
        return tree, False
    del tree[LINE_SEAL]
    if found != _short(json.dumps(tree, ensure_ascii=True)):
        raise ValueError(CHANGED)
    return tree, True


def _short(text: str) -> str:
    """Enough against accidents; a line is no place for 71 characters of digest."""
    return sha256_text(text).removeprefix("sha256:")[:12]
