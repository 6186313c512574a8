"""Prepared data through the readers of Megatron-Bridge and Megatron-Core themselves, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_recipes.data.packed import PARQUET, PackedSplit
from tests.helpers import real_megatron
from tests.helpers.data_prep import chat, run_prepare, write_rows

ROOT = Path(__file__).parents[2]
HELPER = ROOT / "tests" / "helpers" / "megatron_readers.py"


@pytest.fixture(scope="module")
def python() -> Path:
    return real_megatron.python()


def read(python: Path, *arguments: object) -> Any:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    argv = [python, HELPER, *map(str, arguments)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    if "this version has no" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("layout", ["megatron_npy", "parquet"])
def test_packs(python: Path, tmp_path: Path, layout: str) -> None:
    """What the reader gives is what the native columns hold. 0.3.1 reads no parquet; 0.4 and later do."""
    talks = [chat(f"What is {n}?", f"It is {n}. " * (n % 5 + 1)) for n in range(40)]
    rows = write_rows(tmp_path / "rows.jsonl", talks)
    for name in ("native", layout):
        run_prepare(tmp_path / name, [rows], format=name)
    expected = [
        [
            pack["input_ids"].tolist(),
            pack["loss_mask"].tolist(),
            [*pack["seq_start_id"].tolist(), len(pack["input_ids"])],
        ]
        for pack in PackedSplit(tmp_path / "native" / "train")
    ]
    file = "training.npy" if layout == "megatron_npy" else f"train/{PARQUET}"
    found = read(python, "npy" if layout == "megatron_npy" else "parquet", tmp_path / layout / file)
    if found is None:
        assert layout == "parquet"
        assert "0.3.1" in subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    else:
        assert found == expected


@pytest.mark.long
def test_documents(python: Path, tmp_path: Path) -> None:
    texts = [f"document {n}, " + "and so on " * n for n in range(30)]
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"text": t} for t in texts[n::2]]) for n in (0, 1)]
    run_prepare(tmp_path / "out", files, "pretrain", chat_template=None, end_of_document="</s>")
    found = []
    for prefix in sorted((tmp_path / "out" / "train").glob("*.bin")):
        documents = read(python, "indexed", prefix.with_suffix(""))
        ids = np.fromfile(prefix, "<i4").tolist()
        assert [token for document in documents for token in document] == ids
        found += documents
    assert len(found) == 30
    assert {document[-1] for document in found} == {2}, "</s>"


@pytest.mark.long
def test_a_training_takes_a_prepared_folder(python: Path, tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"text": f"document {n}"}]) for n in (0, 1)]
    run_prepare(tmp_path / "out", files, "pretrain", chat_template=None, end_of_document="</s>")
    train, valid, test = read(python, "blend", tmp_path / "out")
    assert train == [[str(tmp_path / "out/train" / f"{n}-source-{n}_text_document") for n in (0, 1)], [1.0, 1.0]]
    assert (valid, test) == (None, None)
