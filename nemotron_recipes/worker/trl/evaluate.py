"""Held-out measurement. Each rank takes its share of the rows; all ranks get the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from nemotron_recipes.errors import Cancelled
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.trl.rewards import matches

TOKENS_AT_ONCE = 16384  # prompt and completion tokens of one batch
LOGITS_AT_ONCE = 2**28  # 1 GiB in float32


def exact_match(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    expected: Sequence[str],
    max_new_tokens: int,
    context: Context,
) -> float:
    """Share of prompts whose greedy completion gives the expected answer (rewards.matches)."""
    mine = range(context.rank, len(prompts), context.world_size)
    right = 0
    for batch in _batches(mine, [len(ids) + max_new_tokens for ids in prompts], TOKENS_AT_ONCE):
        _may_go_on(context)
        texts = complete(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
        right += sum(matches(text, expected[i]) for text, i in zip(texts, batch, strict=True))
    return sum(_gather(right, context)) / len(prompts)


def complete(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy completions as text. Prompts are padded on the left: the Mamba layers mask padding, so a prompt's
    completion doesn't depend on its batch (a test shows it)."""
    length = max(map(len, prompts))
    rows = [[tokenizer.pad_token_id] * (length - len(ids)) + ids for ids in prompts]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    return tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)


def preference_accuracy(
    model: Any, pairs: Sequence[tuple[list[int], list[int], list[int]]], pad: int, context: Context
) -> float:
    """Share of (prompt, chosen, rejected) where the policy gives `chosen` the higher log-probability."""
    mine = range(context.rank, len(pairs), context.world_size)
    chosen = log_probabilities(model, [pairs[i][:2] for i in mine], pad, context)
    rejected = log_probabilities(model, [(pairs[i][0], pairs[i][2]) for i in mine], pad, context)
    better = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    return sum(_gather(better, context)) / len(pairs)


def label_accuracy(
    model: Any, rows: Sequence[tuple[list[int], list[int], bool]], pad: int, context: Context
) -> float | None:
    """For unpaired (prompt, completion, label): how often a desirable completion is more probable than an undesirable
    one, over all pairs of one of each (ties count half). None when one kind is missing."""
    mine = range(context.rank, len(rows), context.world_size)
    scores = log_probabilities(model, [rows[i][:2] for i in mine], pad, context)
    labelled = [(score, rows[i][2]) for score, i in zip(scores, mine, strict=True)]
    everything = [pair for part in _gather(labelled, context) for pair in part]
    good = [score for score, label in everything if label]
    bad = [score for score, label in everything if not label]
    if not good or not bad:
        return None
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def log_probabilities(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], pad: int, context: Context
) -> list[float]:
    """Sum of the log-probabilities of each completion's tokens after its prompt, in float32."""
    sums = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.config.vocab_size)
    for batch in _batches(range(len(rows)), [len(prompt) + len(answer) for prompt, answer in rows], tokens):
        _may_go_on(context)
        length = max(len(rows[i][0]) + len(rows[i][1]) for i in batch)
        ids = torch.full((len(batch), length), pad)
        attention = torch.zeros((len(batch), length), dtype=torch.long)
        wanted = torch.zeros((len(batch), length), dtype=torch.bool)
        for row, i in enumerate(batch):
            prompt, answer = rows[i]
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            attention[row, :end] = 1
            wanted[row, len(prompt) : end] = True
        ids, attention, wanted = (tensor.to(model.device) for tensor in (ids, attention, wanted))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
        each = torch.gather(logits.log_softmax(-1), 2, ids[:, 1:, None])[:, :, 0]
        for i, value in zip(batch, (each * wanted[:, 1:]).sum(1).tolist(), strict=True):
            sums[i] = value
    model.train(was_training)
    return sums


def _batches(rows: range, lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of like length together, at most `tokens` with the padding in a batch of more than one row."""
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda i: lengths[i]):
        if batches and lengths[row] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _gather(value: Any, context: Context) -> list[Any]:
    """`value` of every rank."""
    if context.world_size == 1:
        return [value]
    values: list[Any] = [None] * context.world_size
    distributed.all_gather_object(values, value)
    return values


def _may_go_on(context: Context) -> None:
    if context.stop_requested():
        raise Cancelled("stopped during the held-out measurement")
