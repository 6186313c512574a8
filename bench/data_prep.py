#!/usr/bin/env python3
"""Tokens per CPU-second of SFT data preparation, beside its tokenizer alone and beside TRL's preparation.

usage: python bench/data_prep.py [--rows N] [--slow-rows M] [--many-rows K] [--runs R]
                                 [--tokenizer FOLDER] [--folder FOLDER]

Makes N multi-turn chats from the documentation and Python source on this machine, and, without --tokenizer, a
byte-level BPE of 100,000 tokens from them; both stay in --folder for the next time. Every contender is a process of its
own and they take turns; figures are medians over R rounds of user and system seconds, children included:

- `encode_batch_fast` alone: the rendered texts in memory, and nothing but that call is counted; tokens of rows that are
  longer than a pack count for nobody, though both encode them;
- ours: the whole process from its start, file to packed columns, with both engines;
- TRL: reading the rows, loading the tokenizer, and what SFTTrainer does to a data set (map, assistant masks, packing);
  imports not counted.

Ours also runs once over --many-rows, and, with near-duplicates looked for, over all rows and over that many, with a
fifth of them read twice: a second table shows that memory does not grow. A third has what each gate costs, over
--slow-rows rows. On two quiet cores it all takes about seven minutes, with --runs 1 five.

The first three see the same --slow-rows rows; ours with fastokens also all rows, on one process and on all CPUs, which
shows the memory of each process. Prints a Markdown table (docs/bench.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

SUFFIXES = (".py", ".md", ".rst", ".txt", ".html", "copyright", "changelog")
PACK = 4096  # tokens, the recipe's
CONTENDERS = ("alone", "ours-tokenizers", "ours-fastokens", "trl")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokens per CPU-second of SFT data preparation.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--slow-rows", type=int, default=10_000)
    parser.add_argument("--many-rows", type=int, default=400_000, help="0: not measured")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "nemotron-bench-data")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.contender:
        print(json.dumps(contend(options.contender, options.file, options.tokenizer, options.workers)))
        return 0
    whole, part = options.folder / f"rows-{options.rows}.jsonl", options.folder / f"rows-{options.slow_rows}.jsonl"
    for path, rows in ((whole, options.rows), (part, options.slow_rows)):
        if not path.exists():
            write_rows(path, rows)
    tokenizer = options.tokenizer or options.folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        train_tokenizer(part, tokenizer)
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.runs):
        for name in CONTENDERS:
            found.setdefault(name, []).append(measure(name, part, tokenizer, 1))
        for workers in (1, os.cpu_count() or 1):
            label = f"ours-fastokens, {options.rows} rows, {workers} process(es)"
            found.setdefault(label, []).append(measure("ours-fastokens", whole, tokenizer, workers))
    memory: dict[int, dict[str, float]] = {}
    for rows in filter(None, (options.rows, options.many_rows)):
        file = options.folder / f"rows-{rows}.jsonl"
        if not file.exists():
            write_rows(file, rows)
        label = f"ours-fastokens, {rows} rows, 1 process(es)"
        if label not in found:
            found[label] = [measure("ours-fastokens", file, tokenizer, 1)]
        near = measure("near-duplicates", file, tokenizer, os.cpu_count() or 1)
        memory[rows] = {"no gates, one process": max(one["memory"] for one in found[label])}
        memory[rows] |= {f"near-duplicates, {name}": near[name] for name in ("first process", "other processes")}
    gates = measure("gates", part, tokenizer, 1)
    show(found, options)
    show_memory(memory)
    show_gates(gates)
    return 0


def show_memory(found: dict[int, dict[str, float]]) -> None:
    print("\n| MB per process | " + " | ".join(f"{rows:,} rows" for rows in found) + " |")
    print("|---|" + "---|" * len(found))
    for name in next(iter(found.values())):
        print(f"| {name} | " + " | ".join(f"{each[name]:.0f}" for each in found.values()) + " |")


def show_gates(found: dict[str, Any]) -> None:
    print(
        f"\n| gate | CPU µs per row, of {found['rows']} rows of {found['tokens'] // found['rows']} tokens |\n|---|---|"
    )
    for name, seconds in found["gates"].items():
        print(f"| `{name}` | {seconds / found['rows'] * 1e6:.0f} |")


def show(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    rates = {
        name: statistics.median(one["tokens"] / one["cpu"] for one in results) / 1e6 for name, results in found.items()
    }
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"\nPython {platform.python_version()}, {machine};", end=" ")
    print(f"median of {options.runs} rounds; {options.slow_rows} rows where nothing else is said.\n")
    print("| | Mtok per CPU s | min to max | × encode_batch_fast | × TRL | MB per process | packs full |")
    print("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        each = [one["tokens"] / one["cpu"] / 1e6 for one in results]
        memory = max(one["memory"] for one in results)
        full = f"{results[0]['full']:.2%}" if "full" in results[0] else ""
        print(
            f"| {name} | {rates[name]:.2f} | {min(each):.2f} to {max(each):.2f} | {rates[name] / rates['alone']:.2f} "
            f"| {rates[name] / rates['trl']:.1f} | {memory:.0f} | {full} |"
        )


def measure(name: str, file: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """One contender as a process; of ours the CPU seconds of the whole process and its children."""
    words = [sys.executable, __file__, "--contender", name, "--file", str(file), "--tokenizer", str(tokenizer)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, "--workers", str(workers)], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result.setdefault("cpu", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"{name}, {file.name}, {workers} process(es): {result}", file=sys.stderr, flush=True)
    return result


def contend(name: str, file: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """Run one contender in this process: tokens, MB, and CPU seconds where not the whole process counts."""
    if name == "alone":
        result = encode_alone(file, tokenizer)
    elif name == "gates":
        result = prepare_with_gates(file, tokenizer)
    elif name == "trl":
        result = prepare_with_trl(file, tokenizer)
    elif name == "near-duplicates":
        result = prepare_with_ours(file, tokenizer, "fastokens", workers, near_duplicates=True)
    else:
        result = prepare_with_ours(file, tokenizer, name.removeprefix("ours-"), workers)
    usage = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {**result, "memory": max(usage), "first process": usage[0], "other processes": usage[1]}


def prepare_with_ours(
    file: Path, tokenizer: Path, engine: str, workers: int, near_duplicates: bool = False
) -> dict[str, Any]:
    """`near_duplicates`: look for them, among all rows and a fifth of them once more."""
    from nemotron_recipes.data.gates.build import build_gates
    from nemotron_recipes.data.job import Job
    from nemotron_recipes.data.metadata import write_metadata
    from nemotron_recipes.data.prepare import prepare
    from nemotron_recipes.data.settings import read_settings
    from nemotron_recipes.data.template import template_source

    sources: list[dict[str, Any]] = [{"path": str(file)}]
    if near_duplicates:
        sources.append({"path": str(file), "rows": int(file.stem.rpartition("-")[2]) // 5})
    tree = {"sources": sources, "tokenizer": str(tokenizer), "engine": engine, "workers": workers}
    settings = read_settings({**tree, "gates": {"near_duplicates": {}} if near_duplicates else None}, "sft")
    gates = build_gates(settings.gates, ())
    job = Job("sft", settings, (file,) * len(sources), tokenizer, template_source("nemotron3"), gates)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        report = prepare(job, Path(folder))
        write_metadata(job, report, Path(folder))
    if report.warnings:
        sys.exit(f"not exact: {report.warnings}")
    train = report.splits["train"]
    tokens = sum(split.tokens for split in report.splits.values())
    return {"tokens": tokens, "full": train.tokens / (train.packs * job.settings.pack_size)}


def prepare_with_gates(file: Path, tokenizer: Path) -> dict[str, Any]:
    """All gates at once, none of which leaves out much: what one drops the next does not see. What duplicates cost when
    they are looked for among all rows, when shards are merged, is no part of it."""
    from nemotron_recipes.data.gate_settings import LANGUAGES
    from nemotron_recipes.data.gates.build import build_gates
    from nemotron_recipes.data.job import Job
    from nemotron_recipes.data.prepare import prepare
    from nemotron_recipes.data.settings import read_settings
    from nemotron_recipes.data.template import template_source

    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        evaluation = Path(folder, "evaluation.jsonl")
        evaluation.write_text("".join(f'{{"question": "{"nothing like this " * n}"}}\n' for n in range(1, 500)))
        gates = {
            "provenance": {"license_field": None, "source_field": None, "customer_data_field": None},
            "structure": {"min_turns": 1},
            "quality": {"where": ["score >= 0"], "missing": "keep"},
            "length": {"min_tokens": 1},
            "repetition": {"max_share": 1.0},
            "language": {"allow": sorted(LANGUAGES), "min_probability": 0.0},
            "contamination": {"files": [str(evaluation)], "fields": ["question"]},
            "pii": {"action": "report"},
            "exact_duplicates": {},
            "near_duplicates": {},
        }
        tree = {"sources": [{"path": str(file)}], "tokenizer": str(tokenizer), "workers": 1, "gates": gates}
        settings = read_settings({**tree, "engine": "fastokens"}, "sft")
        built = build_gates(settings.gates, (evaluation,))
        job = Job("sft", settings, (file,), tokenizer, template_source("nemotron3"), built)
        Path(folder, "out").mkdir()
        report = prepare(job, Path(folder, "out"))
    tokens = sum(split.tokens for split in report.splits.values())
    return {"tokens": tokens, "rows": report.total.read, "gates": report.gate_seconds}


def encode_alone(file: Path, tokenizer: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    from nemotron_recipes.data.encoder import Encoder
    from nemotron_recipes.data.messages import BadRow
    from nemotron_recipes.data.rows import RowReader
    from nemotron_recipes.data.settings import Columns
    from nemotron_recipes.data.template import template_source

    encoder = Encoder(tokenizer, template_source("nemotron3"))
    reader = RowReader("sft", Columns())
    talks = []
    for line in file.open("rb"):
        with suppress(BadRow):
            talks.append(reader.read(json.loads(line)).messages)
    render = encoder.template.render
    texts = [render(one, [], add_generation_prompt=False, enable_thinking=True).text for one in talks]
    alone = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    tokens = 0
    begun = time.process_time()
    for start in range(0, len(texts), 1000):
        encodings = alone.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
        tokens += sum(len(one) for one in encodings if len(one) <= PACK)
    return {"tokens": tokens, "cpu": time.process_time() - begun}


def prepare_with_trl(file: Path, tokenizer: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from nemotron_recipes.data.template import template_source

    begun = time.process_time()
    rows = [json.loads(line) for line in file.open("rb")]
    processing = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"),
        chat_template=template_source("nemotron3"),
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(processing), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        arguments = SFTConfig(
            folder, max_length=4096, packing=True, assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False
        )
        trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processing)
        cpu = time.process_time() - begun
        assert trainer.train_dataset is not None
        lengths = [len(one) for one in trainer.train_dataset["input_ids"]]
    return {"tokens": sum(lengths), "cpu": cpu, "full": sum(lengths) / (len(lengths) * 4096)}


def write_rows(path: Path, count: int) -> None:
    """Chats of one to four turns whose texts are consecutive paragraphs of real files."""
    random_ = random.Random(0)
    files = sorted(text_files())
    random_.shuffle(files)
    written = 0
    print(f"making {count} chats from {len(files)} files", file=sys.stderr, flush=True)
    with path.open("w", encoding="utf-8") as out:
        while written < count:
            before = written
            for file in files:
                for chat in chats(file, random_):
                    out.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")
                    written += 1
                    if written == count:
                        return
            if written == before:
                sys.exit("this machine has no text to make chats of")


def text_files() -> Iterator[Path]:
    for root in {"/usr/share/doc", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}:
        for folder, _, names in os.walk(root):
            yield from (Path(folder, name) for name in names if name.endswith(SUFFIXES))


def chats(file: Path, random_: random.Random) -> Iterator[list[dict[str, str]]]:
    try:
        paragraphs = [part for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    except (OSError, UnicodeDecodeError):
        return
    at = 0
    while at < len(paragraphs) - 4:
        chat = [{"role": "system", "content": paragraphs[at][:400]}] if random_.random() < 0.3 else []
        for _ in range(random_.choice([1, 2, 2, 3, 4])):
            asked, answered = random_.randint(1, 2), random_.randint(1, 8)
            question = "\n\n".join(paragraphs[at : at + asked])[:3000]
            answer = "\n\n".join(paragraphs[at + asked : at + asked + answered])[:8000]
            at += asked + answered
            if question.strip() and answer.strip():
                chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if chat and chat[-1]["role"] == "assistant":
            yield chat


def train_tokenizer(file: Path, folder: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from nemotron_recipes.tiny.tokenizer import MARKER_TOKENS, SPECIAL_TOKENS

    print("training a tokenizer", file=sys.stderr, flush=True)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    texts = (message["content"] for line in file.open("rb") for message in json.loads(line)["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKER_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    sys.exit(main())
