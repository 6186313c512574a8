"""A prepared preference or RL row in the words of other trainers. Standard library only: their images have no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem, UserError


def trl_row(row: dict[str, Any], method: str) -> dict[str, Any]:
    """TRL's conversational layouts: explicit prompt and answers; GRPO hands the other columns to its rewards."""
    names = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion", "label")}
    kept = {name: row[name] for name in names.get(method, ("prompt", "expected_answer"))}
    if method == "rl":
        kept |= {name: value for name, value in row["extra"].items() if name not in kept}
    return kept | ({"tools": row["tools"]} if row.get("tools") else {})


def of_trl(row: dict[str, Any], method: str) -> dict[str, Any]:
    """What `trl_row` was given, less the token ids."""
    if method != "rl":
        return row
    known = {name: row[name] for name in ("prompt", "expected_answer", "tools") if name in row}
    return known | {"extra": {name: value for name, value in row.items() if name not in known}}


def of_nemo_rl(row: dict[str, Any], method: str) -> dict[str, Any]:
    """What `nemo_rl_row` was given, less the token ids and fields that have no place there."""
    if method == "dpo":
        answers = [one["completion"] for one in sorted(row["completions"], key=lambda one: one["rank"])]
        return {"prompt": row["context"], "chosen": answers[0], "rejected": answers[1]}
    return {"prompt": [{"role": "user", "content": row["input"]}], "expected_answer": row["output"], "extra": {}}


def nemo_rl_row(row: dict[str, Any], method: str, where: str) -> dict[str, Any]:
    """NeMo-RL's PreferenceDataset (rank 0 is preferred) and ResponseDataset (one question, one expected answer)."""
    if row.get("tools"):
        what = "NeMo-RL's layouts have no place for tools, and this row has some"
        raise UserError(Problem(what, where, "--to trl keeps them"))
    if method == "dpo":
        ranked = [{"rank": rank, "completion": row[name]} for rank, name in enumerate(("chosen", "rejected"))]
        return {"context": row["prompt"], "completions": ranked}
    roles = [message["role"] for message in row["prompt"]]
    if roles != ["user"]:
        what = "NeMo-RL's response layout holds one question as text, and this row is a conversation"
        raise UserError(Problem(what, where, "--to trl keeps conversations"))
    return {"input": row["prompt"][0]["content"], "output": row["expected_answer"]}


def write_rows(source: Path, target: Path, method: str, layout: str, given: str = "native") -> None:
    """The rows of one split (JSON Lines), which are in the layout `given`, in the layout "trl" or "nemo_rl".
    UserError: a row that has no place there."""
    read = {"native": lambda row, _: row, "trl": of_trl, "nemo_rl": of_nemo_rl}[given]
    if not source.is_file():
        raise UserError(Problem(f"{source} is not there", fix="prepare anew"))
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8", newline="\n") as out:
        for number, line in enumerate(rows, 1):
            where = f"{source}, line {number}"
            try:
                row = read(json.loads(line), method)
                made = trl_row(row, method) if layout == "trl" else nemo_rl_row(row, method, where)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                what = f"the row is not as data prep wrote it: {error!r}"
                raise UserError(Problem(what, where, "prepare anew")) from None
            out.write(json.dumps(made, ensure_ascii=True) + "\n")
