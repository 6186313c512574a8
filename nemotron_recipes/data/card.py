"""The data card: what a person asks before training on data. Where each source came from, under which licence, what was
removed and why, what was held out, how long the rows are, and what nobody has looked at.

data-card.json, data-card.md, data-card.png. Like all of the output they depend on nothing but the inputs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_recipes.data.card_plot import draw
from nemotron_recipes.data.settings import SPLITS, Settings
from nemotron_recipes.errors import printable

EXAMPLES = 3  # of each reason for which rows were bad
FEW = 50  # held-out rows that say little
_REMOTE = ("hf://", "s3://", "gs://", "artifact:", "sample:")


def write_card(output: Path, metadata: dict[str, Any], settings: Settings) -> None:
    """`metadata`: what metadata.json will say."""
    card = describe(metadata, settings, _bad_rows(output))
    _write(output, card)
    panels = {
        title: {name: split[key] for name, split in card["splits"].items() if split["rows"]}
        for title, key in (
            ("Sequences by length", "length_counts"),
            ("Tokens by length of their sequence", "length_tokens"),
        )
    }
    (output / "data-card.png").write_bytes(draw(panels, card["length_bin"]))


def convert_card(source: Path, target: Path, metadata: dict[str, Any]) -> None:
    """The card of data that were converted: what it says of the layout follows `metadata`, all else stays. Data from
    before there were cards get none."""
    if not (source / "data-card.json").is_file():
        return
    card = json.loads((source / "data-card.json").read_text(encoding="utf-8"))
    card |= {key: metadata[key] for key in ("format", "pack_size")}
    card["splits"] = {name: card["splits"][name] | metadata["splits"][name] for name in SPLITS}
    _write(target, card)
    shutil.copyfile(source / "data-card.png", target / "data-card.png")


def _write(output: Path, card: dict[str, Any]) -> None:
    text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (output / "data-card.json").write_bytes(text.encode("utf-8", "backslashreplace"))
    (output / "data-card.md").write_bytes(markdown(card).encode("utf-8", "backslashreplace"))


def describe(metadata: dict[str, Any], settings: Settings, bad: dict[str, list[str]]) -> dict[str, Any]:
    """The card as plain data. `bad`: reason -> examples, of rows that could not be used."""
    sources = []
    for facts, source in zip(metadata["sources"], settings.sources, strict=True):
        remote = source.path if source.path.startswith(_REMOTE) else None
        told = {"reference": remote, "origin": source.origin, "license": source.license, "weight": source.weight}
        sources.append({**facts, **told, "split": source.split})
    by_gate = {reason: gate for gate, reasons in metadata["gates"].items() for reason in reasons}
    removed = []
    for reason, rows in metadata["total"]["rows_dropped"].items():
        gate = by_gate.get(reason)
        examples = metadata["gates"][gate][reason]["examples"] if gate else bad.get(reason, [])
        removed.append({"reason": reason, "gate": gate, "rows": rows, "examples": examples})
    noted = [
        {"reason": reason, "gate": gate, **facts}
        for gate, reasons in metadata["gates"].items()
        for reason, facts in reasons.items()
        if reason not in metadata["total"]["rows_dropped"]
    ]
    card = {
        "method": metadata["method"],
        "format": metadata["format"],
        "pack_size": metadata["pack_size"],
        "length_bin": metadata["pack_size"] / len(metadata["lengths"]["train"]["length_counts"]),
        "tokenizer": metadata["tokenizer"],
        "chat_template": metadata["chat_template"],
        "sources": sources,
        "total": metadata["total"],
        "removed": sorted(removed, key=lambda one: (-one["rows"], one["reason"])),
        "noted": noted,
        "splits": {name: {**facts, **metadata["lengths"][name]} for name, facts in metadata["splits"].items()},
        "gates": [name for name, section in vars(settings.gates).items() if section is not None]
        if settings.gates
        else [],
    }
    return {**card, "risks": risks(card, settings)}


def risks(card: dict[str, Any], settings: Settings) -> list[str]:
    """What a person should know who trains on this."""
    found = []
    for source in card["sources"]:
        missing = [what for what in ("origin", "license") if not source[what]]
        if missing:
            found.append(
                f"{' and '.join(missing)} of source {source['name']} not stated (data.sources[].origin, .license)"
            )
    gates = settings.gates
    if gates is None or gates.pii is None:
        found.append("nobody looked for personal data and credentials (data.gates.pii)")
    elif gates.pii.action == "report":
        rows = sum(one["rows"] for one in card["noted"] if one["gate"] == "pii")
        if rows:
            found.append(f"{rows} rows hold personal data or credentials, and are in the data (data.gates.pii.action)")
    if gates is None or gates.contamination is None:
        found.append("not compared with any evaluation (data.gates.contamination)")
    if gates is None or (gates.exact_duplicates is None and gates.near_duplicates is None):
        found.append("duplicates were not looked for: held-out rows may stand in the training data, too")
    for split in SPLITS[1:]:
        rows = card["splits"][split]["rows"]
        if rows < FEW:
            found.append(f"{rows} {split} rows" + (": figures on so few mean little" if rows else ": none is held out"))
    total = card["total"]
    dropped = total["rows_read"] - total["rows_written"]
    if dropped > 0.1 * total["rows_read"]:
        found.append(f"{dropped / total['rows_read']:.0%} of the rows were left out")
    if total["sequences_truncated"]:
        found.append(f"{total['sequences_truncated']} sequences are cut off in the middle")
    if total["sequences_split"]:
        found.append(f"{total['sequences_split']} sequences are split: later pieces lack what came before")
    return found


def markdown(card: dict[str, Any]) -> str:
    """The card for people. Text from rows stands in code spans, where it can't be markup."""
    total = card["total"]
    lines = ["# Data card", "", f"{card['method']}, {total['rows_written']} of {total['rows_read']} rows.", ""]
    lines += ["## Sources", ""]
    header = ("source", "from", "origin", "license", "rows read", "written")
    lines += _table(header, ([
        _code(source["name"]), _files(source), _said(source["origin"]), _said(source["license"]),
        source["rows_read"], source["rows_written"]
    ] for source in card["sources"]))  # fmt: skip
    lines += ["## Splits", ""]
    header = ("split", "rows", "sequences", "tokens", "learned tokens", "longest sequence")
    lines += _table(header, ([
        name, split["rows"], split["sequences"], split["tokens"], split["learned_tokens"], split["longest"]
    ] for name, split in card["splits"].items()))  # fmt: skip
    lines += ["![Sequences and tokens by length](data-card.png)", "", "## Removed", ""]
    if card["removed"]:
        lines += _table(("reason", "gate", "rows", "examples"), _reasons(card["removed"]))
    else:
        lines += ["Nothing.", ""]
    if card["noted"]:
        lines += ["## Changed or noted, and kept", ""]
        lines += _table(("reason", "gate", "rows", "examples"), _reasons(card["noted"]))
    lines += ["## Risks", ""]
    lines += [f"- {_plain(risk)}" for risk in card["risks"]] or ["None that data preparation can see."]
    lines += ["", f"Gates: {', '.join(card['gates']) or 'none'}. Tokenizer {card['tokenizer']['digest']}."]
    return "\n".join([*lines, ""])


def _reasons(found: list[dict[str, Any]]) -> Iterator[list[Any]]:
    for one in found:
        yield [one["reason"], one["gate"] or "", one["rows"], "<br>".join(map(_code, one["examples"]))]


def _files(source: dict[str, Any]) -> str:
    identities = [file["identity"] for file in source["files"]]
    shown = [_code(source["reference"])] if source["reference"] else []
    for identity in identities[:EXAMPLES]:
        mark = identity.get("digest") or identity.get("revision") or ""
        name = " ".join(identity[key] for key in ("name", "split", "file") if identity.get(key))
        shown.append(_code(name) + (f" {mark[:19]}" if mark else ""))
    if len(identities) > EXAMPLES:
        shown.append(f"{len(identities)} files in all")
    return "<br>".join(shown)


def _table(header: tuple[str, ...], rows: Any) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def _said(text: str | None) -> str:
    return _plain(text) if text else "not stated"


def _code(text: str) -> str:
    """A code span on one line of a table."""
    return "`" + printable(text).replace("\n", " ").replace("`", "'").replace("|", "\\|") + "`"


def _plain(text: str) -> str:
    """Text without markup."""
    text = printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|!#" else c for c in text)


def _bad_rows(output: Path) -> dict[str, list[str]]:
    """The first few of each reason."""
    found: dict[str, list[str]] = {}
    with (output / "bad_rows.jsonl").open(encoding="ascii") as handle:
        for line in handle:
            bad = json.loads(line)
            examples = found.setdefault(bad["reason"], [])
            if len(examples) < EXAMPLES:
                examples.append(f"{bad['file']}, line {bad['line']}: {bad['detail'][:120]}")
    return found
