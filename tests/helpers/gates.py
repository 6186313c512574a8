"""Rows and verdicts of a single gate."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_recipes.data.gate_settings import GateSettings
from nemotron_recipes.data.gates import Candidate
from nemotron_recipes.data.gates.build import build_gates
from tests.helpers.data_prep import read_row

Turn = dict[str, Any]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> Turn:
    return {"role": "assistant", "content": text, **fields}


TALK = [user("What is 2+2?"), assistant("Four.")]


def candidate(row: dict[str, Any] | None = None, method: str = "sft", **fields: Any) -> Candidate:
    whole = {**(row or {"messages": TALK}), **fields}
    return Candidate(read_row(whole, method), whole, "train")


def judge(settings: GateSettings, one: Candidate, lengths: tuple[int, ...] = (), files: tuple[Path, ...] = ()) -> Any:
    """The verdict of the only gate, after a trip to another process."""
    (gate,) = pickle.loads(pickle.dumps(build_gates(settings, files).rows))
    gate.open()
    verdict = gate.check(one)
    return verdict or gate.check_tokens(one, [np.zeros(length, dtype=np.int32) for length in lengths])


def reason(*arguments: Any, **keywords: Any) -> str | None:
    verdict = judge(*arguments, **keywords)
    return None if verdict is None else verdict.reason
