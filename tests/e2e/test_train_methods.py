"""Each method for a few steps inside this process: what is learned from, what comes out, what is measured."""

import json

import pytest

from nemotron_recipes.rundir import read_jsonl
from nemotron_recipes.worker.trl.config import read_config
from tests.helpers.training import ARCH, context_for, prepared, worker_file

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("data")
    return {method: prepared(tmp / method, method) for method in ("sft", "dpo", "kto", "rl")}


@pytest.fixture(scope="module")
def sft(tmp_path_factory, data):
    """(context, output folder) of a short full SFT, the start of the other methods."""
    tmp = tmp_path_factory.mktemp("sft")
    context = run(worker_file(tmp / "sft", data["sft"], train={"train_iters": 12, "micro_batch_size": 8}))
    return context, context.output("model")


def run(path):
    from nemotron_recipes.worker.trl import run as worker

    config, context = context_for(path)
    worker(config, context)
    return context


def trainer_for(path):
    """(trainer, context) ready to train, from a worker file."""
    from nemotron_recipes.worker.trl.data import DataFolder
    from nemotron_recipes.worker.trl.models import base_folders, load_model, load_tokenizer
    from nemotron_recipes.worker.trl.trainers import build_trainer

    config, context = context_for(path)
    settings = read_config(config)
    with base_folders(settings, context) as base:
        data = DataFolder(context.inputs["data.path"], settings.method, base.tokenizer)
        tokenizer = load_tokenizer(base.tokenizer, data.template)
        return build_trainer(settings, context, load_model(base.model, settings), tokenizer, data), context


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_tiny_model_is_the_real_architecture_and_repeatable(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, NemotronHForCausalLM

    from nemotron_recipes.tiny.model import write_model

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_model(tmp_path / name, ARCH, seed)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "abc")
    assert isinstance(a, NemotronHForCausalLM)
    assert 500_000 <= sum(p.numel() for p in a.parameters()) <= 2_000_000
    assert {"linear_attention", "full_attention", "moe"} <= set(a.config.layers_block_type)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_sft_writes_a_model_that_loads_and_says_the_same(sft, data):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    context, folder = sft
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == (data["sft"] / "chat_template.jinja").read_text()
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 5
    assert {"exact_match_before", "exact_match_after", "loss", "validation_loss"} <= set(context.results)
    messages = [{"role": "user", "content": "Largest of 12 34 56?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert model(**ids).logits.isfinite().all()
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "some files can be read by fewer people than others"


def test_sft_leaves_metrics_and_a_picture(sft):
    context, _ = sft
    lines = list(read_jsonl(context.dir.metrics))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"step", "steps", "loss", "lr", "time", "seconds_per_step"} <= set(steps[0])
    assert any("validation_loss" in line for line in lines)
    picture = (context.dir.path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_no_conversation_of_a_pack_sees_another(sft, data):
    """Another conversation's tokens are changed; the losses of this one stay what they were."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from nemotron_recipes.data.packed import PackedSplit
    from nemotron_recipes.worker.trl.packed import PackCollator

    model = AutoModelForCausalLM.from_pretrained(sft[1]).eval()
    packs = PackedSplit(data["sft"] / "train")
    pack = next(p for p in packs if len(p["seq_start_id"]) == 2)
    start = int(pack["seq_start_id"][1])

    def token_losses(changed):
        batch = PackCollator([changed], pad_token_id=3)([{"index": 0}])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100
        )
        assert (each != 0).sum() == changed["loss_mask"].sum()
        return each

    original = token_losses(pack)
    for perturbed, kept in ((slice(0, start), 1), (slice(start, None), 0)):
        ids = np.array(pack["input_ids"])
        ids[perturbed] = (ids[perturbed] + 7) % 250 + 12
        changed = token_losses({**pack, "input_ids": ids})
        assert torch.allclose(changed[kept], original[kept], rtol=0, atol=1e-6)
        assert not torch.allclose(changed[1 - kept], original[1 - kept], rtol=0, atol=1e-2)


def test_padding_on_the_left_changes_no_completion(tmp_path, sft, data):
    """Alone or in a batch with longer prompts: the same text, and the same logits. The weights are large, so that what
    the model says depends on all that it sees."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemotron_recipes.tiny.model import write_model
    from nemotron_recipes.worker.trl.evaluate import complete

    write_model(tmp_path, {**ARCH, "initializer_range": 0.4}, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(sft[1])
    prompts = [row["prompt_ids"] for row in read_jsonl(data["sft"] / "test" / "rows.jsonl")][:6]
    prompts = [ids[:4] + ids[4:8] * extra + ids[4:] for extra, ids in enumerate(prompts)]  # six lengths
    assert len({len(ids) for ids in prompts}) == 6
    together = complete(model, tokenizer, prompts, 8)
    assert together == [complete(model, tokenizer, [ids], 8)[0] for ids in prompts]
    assert len(set(together)) == 6

    import torch

    length = max(map(len, prompts))
    rows = torch.tensor([[3] * (length - len(ids)) + ids for ids in prompts])
    with torch.no_grad():
        padded = model(
            input_ids=rows,
            attention_mask=(torch.arange(length) >= length - torch.tensor([[len(p)] for p in prompts])).long(),
        )
        for row, ids in enumerate(prompts):
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            assert torch.allclose(padded.logits[row, -len(ids) :], alone, atol=1e-4)


LORA = {"dim": 4, "alpha": 8, "target_parameters": ["mixer.experts.up_proj", "mixer.experts.down_proj"]}


def test_lora_is_merged_and_kept_beside(tmp_path, sft, data):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_folder = sft[1]
    path = worker_file(tmp_path / "lora", data["sft"], model=base_folder, peft=LORA, optimizer={"lr": 1e-2})
    folder = run(path).output("model")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder / "adapter")
    ids = torch.tensor([[4, 20, 30, 40]])
    with torch.no_grad():
        before, after, beside = (m.eval()(input_ids=ids).logits for m in (base, merged, adapted))
    assert torch.allclose(after, beside, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(base.lm_head.weight, merged.lm_head.weight)


@pytest.mark.parametrize("kind", ["lora", "dpo", "kto", "grpo"])
def test_a_resumed_training_has_the_same_losses_and_gradients(tmp_path, sft, data, kind, monkeypatch):
    """The full SFT's resume is tested with kills (test_train_equivalence.py)."""
    from nemotron_recipes.worker.trl.rewards import REWARDS

    # The exact match of so short a training is always 0.
    monkeypatch.setitem(
        REWARDS, "exact_match", lambda completions, **columns: [sum(map(ord, c)) % 7 / 7 for c in completions]
    )
    method = "sft" if kind == "lora" else kind
    sections = {
        "model": sft[1],
        "evaluation": {"rows": 0},
        "checkpoint": {"save_interval": 2},
        "train": {"train_iters": 4},
    }
    if kind == "lora":
        sections["peft"] = LORA
    if kind == "grpo":
        sections |= {
            "train": {"train_iters": 4, "global_batch_size": 16, "micro_batch_size": 8},
            "optimizer": {"lr": 1e-3},
        }
    source = data["rl" if kind == "grpo" else method]
    whole = run(worker_file(tmp_path / "whole", source, method, **sections))
    path = worker_file(tmp_path / "resumed", source, method, **sections)
    text = path.read_text()
    assert "resume_from: null" in text
    checkpoint = whole.dir.checkpoints / "iter_0000002"
    path.write_text(text.replace("resume_from: null", f"resume_from: {json.dumps(str(checkpoint))}"))
    resumed = run(path)
    expected, found = (
        [(line["loss"], line["grad_norm"]) for line in read_jsonl(context.dir.metrics) if "loss" in line]
        for context in (whole, resumed)
    )
    assert len(set(expected)) == 4
    for one, other in zip(found, expected[2:], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_a_finished_training_can_be_taken_up_again(tmp_path, sft, data):
    """Killed between the last step and the output: the next attempt has nothing left to train."""
    import torch
    from transformers import AutoModelForCausalLM

    context, folder = sft
    path = worker_file(tmp_path / "again", data["sft"], train={"train_iters": 12, "micro_batch_size": 8})
    last = json.dumps(str(context.dir.checkpoints))
    path.write_text(path.read_text().replace("resume_from: null", f"resume_from: {last}"))
    again = run(path)
    models = [AutoModelForCausalLM.from_pretrained(made) for made in (folder, again.output("model"))]
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
    assert again.results["exact_match_after"] == context.results["exact_match_after"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_raise_the_accuracy_that_they_train(tmp_path, sft, data, method):
    """On its own training rows for a few steps: the measured accuracy follows."""
    from nemotron_recipes.worker.trl.evaluate import label_accuracy, log_probabilities, preference_accuracy

    sections = {
        "optimizer": {"lr": 1e-3},
        "train": {"train_iters": 12, "global_batch_size": 32, "micro_batch_size": 32},
    }
    path = worker_file(tmp_path / method, data[method], method, model=sft[1], **sections)
    trainer, context = trainer_for(path)
    rows = list(read_jsonl(data[method] / "train" / "rows.jsonl"))

    def accuracy():
        if method == "dpo":
            pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
            return preference_accuracy(trainer.model, pairs, 3, context)
        return label_accuracy(
            trainer.model, [(row["prompt_ids"], row["completion_ids"], row["label"]) for row in rows], 3, context
        )

    before, start = accuracy(), weights(trainer.model)
    trainer.train()
    assert accuracy() > before + 0.05
    assert any((parameter != start[name]).any() for name, parameter in trainer.model.named_parameters())
    short = [(rows[0]["prompt_ids"], rows[0]["prompt_ids"][:2]), (rows[1]["prompt_ids"], rows[1]["prompt_ids"][:5])]
    together = log_probabilities(trainer.model, short, 3, context)
    assert together == pytest.approx(
        [log_probabilities(trainer.model, [row], 3, context)[0] for row in short], abs=1e-3
    )


def test_the_reference_model_of_dpo_is_the_base(tmp_path, sft, data):
    import torch

    trainer, _ = trainer_for(worker_file(tmp_path / "dpo", data["dpo"], "dpo", model=sft[1], optimizer={"lr": 1e-2}))
    start = weights(trainer.model)
    trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in trainer.ref_model.named_parameters())
    assert not all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


def test_grpo_normalises_rewards_inside_their_group(tmp_path, sft, data, monkeypatch):
    """Mixed rewards: advantage = (reward - group mean) / (group's standard deviation + 1e-4), and the weights move."""
    import torch

    from nemotron_recipes.worker.trl.rewards import REWARDS

    given = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    monkeypatch.setitem(REWARDS, "exact_match", lambda completions, **columns: given)
    path = worker_file(
        *(tmp_path / "grpo", data["rl"], "grpo"),
        model=sft[1],
        train={"train_iters": 1, "global_batch_size": 16, "micro_batch_size": 16},
    )
    trainer, _ = trainer_for(path)
    start = weights(trainer.model)
    trainer.train()
    assert list(next(iter(trainer._logs["rewards"].values()))) == given
    found = torch.tensor(list(trainer._logs["advantages"]))
    first = torch.tensor(given[:8])
    expected = torch.cat([(first - first.mean()) / (first.std() + 1e-4), torch.zeros(8)])
    assert torch.allclose(found, expected, atol=1e-5)
    assert found[:8].sum().abs() < 1e-4 and set(found[:8].sign().tolist()) == {1.0, -1.0}
    prompts = list(trainer._logs["prompt"])
    assert len(set(prompts[:8])) == len(set(prompts[8:])) == 1 and prompts[0] != prompts[8]
    assert any((parameter != start[name]).any() for name, parameter in trainer.model.named_parameters())


def test_grpo_learns_nothing_from_equal_rewards(tmp_path, sft, data, monkeypatch):
    import torch

    from nemotron_recipes.worker.trl.rewards import REWARDS

    monkeypatch.setitem(REWARDS, "exact_match", lambda completions, **columns: [1.0] * len(completions))
    path = worker_file(
        *(tmp_path / "grpo", data["rl"], "grpo"),
        model=sft[1],
        train={"train_iters": 1, "global_batch_size": 16, "micro_batch_size": 16},
    )
    trainer, _ = trainer_for(path)
    start = weights(trainer.model)
    trainer.train()
    assert set(trainer._logs["advantages"]) == {0.0}
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


def test_grpo_end_to_end_with_a_reference_model(tmp_path, sft, data):
    """A KL term needs a second copy of the base; rewards are measured and the output loads."""
    from transformers import AutoModelForCausalLM

    path = worker_file(
        *(tmp_path / "grpo", data["rl"], "grpo"),
        model=sft[1],
        grpo={"kl_beta": 0.01, "max_completion_length": 4},
        train={"train_iters": 2, "global_batch_size": 16, "micro_batch_size": 8},
    )
    context = run(path)
    AutoModelForCausalLM.from_pretrained(context.output("model"))
    lines = [line for line in read_jsonl(context.dir.metrics) if "loss" in line]
    assert len(lines) == 2 and all(0.0 <= line["reward"] <= 1.0 and line["kl"] is not None for line in lines)
    assert {"exact_match_before", "exact_match_after"} <= set(context.results)
