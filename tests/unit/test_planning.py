"""Request -> Plan: pinned inputs, three identities, one path for a stage and a pipe; nothing written."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.local.executor import LocalExecutor
from nemotron_recipes.planning import code
from nemotron_recipes.planning import plan as planning
from nemotron_recipes.planning.resolve import Resolver
from nemotron_recipes.rundir import RunDir, write_record
from nemotron_recipes.spec import Artifact, Code, Plan, Producer, Request, to_json

CODE = Code(digest="sha256:" + "0" * 64, version="test")


@pytest.fixture(autouse=True)
def fixed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "describe_code", lambda: CODE)


def request_of(cwd: Path, *words: str, config: str = "tiny", **fields) -> Request:
    return Request("nano3", words, config, cwd=str(cwd), **fields)


def plan_of(cwd: Path, *words: str, **fields) -> Plan:
    return lifecycle.prepare(request_of(cwd, *words, **fields)).plan


def problems_of(cwd: Path, *words: str, **fields) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(cwd, *words, **fields)
    return str(caught.value)


def chats(cwd: Path, text: str = "hello") -> Path:
    path = cwd / "chats.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]})
    )
    return path


def own_data(cwd: Path, **fields) -> Plan:
    overrides = ("data.sources=[{path: chats.jsonl}]", "data.tokenizer=tiny", *fields.pop("overrides", ()))
    return plan_of(cwd, "data", "prep", "sft", config="default", overrides=overrides, **fields)


def everything_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_planning_and_rendering_write_nothing(tmp_path: Path) -> None:
    lifecycle.prepare(request_of(tmp_path, "pipe"))
    assert everything_below(tmp_path) == []


def test_a_pipe_is_one_plan_whose_later_inputs_are_pending(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "pipe")
    stages = {stage.name: stage for stage in plan.stages}
    sft, prep = stages["sft"], stages["data-prep-sft"]
    data = sft.inputs["data.path"]
    assert data.source == "pending"
    assert data.producer == Producer(prep.fingerprint, plan.id, "data-prep-sft", "data")
    assert stages["rl"].inputs["model.path"].producer == Producer(sft.fingerprint, plan.id, "sft", "model")
    assert len({stage.fingerprint for stage in plan.stages}) == len(plan.stages)
    assert plan.id in sft.launch.files["train.yaml"], "the one id is in the bytes that run"


def test_a_plan_survives_json(tmp_path: Path) -> None:
    prepared = lifecycle.prepare(request_of(tmp_path, "pipe", overrides=("sft.optimizer.lr=1e-5",)))
    lifecycle.save_plan(prepared, tmp_path / "plan.json")
    assert lifecycle.load_plan(tmp_path / "plan.json") == prepared.plan


def test_each_request_has_its_own_id_and_the_same_fingerprint(tmp_path: Path) -> None:
    first, second = plan_of(tmp_path, "pipe"), plan_of(tmp_path, "pipe")
    assert first.id != second.id
    assert [s.fingerprint for s in first.stages] == [s.fingerprint for s in second.stages]


def test_what_moves_a_fingerprint_and_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chats(tmp_path)
    base = own_data(tmp_path).stages[0].fingerprint
    same = [
        ("outputs.data=other",),
        ("run.env={A: b}",),
        ("data.sources=[{path: ./chats.jsonl}]",),
    ]
    for overrides in same:
        assert own_data(tmp_path, overrides=overrides).stages[0].fingerprint == base, overrides
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(path.read_bytes())
    elsewhere = own_data(tmp_path, overrides=("data.sources=[{path: elsewhere.jsonl}]",))
    assert elsewhere.stages[0].fingerprint == base, "the contents count, not where they lie"
    for overrides in [("data.pack_size=128",), ("data.sample=1",), ("data.overlong=truncate",)]:
        assert own_data(tmp_path, overrides=overrides).stages[0].fingerprint != base, overrides
    chats(tmp_path, "other words")
    assert own_data(tmp_path).stages[0].fingerprint != base
    chats(tmp_path)
    monkeypatch.setattr(planning, "describe_code", lambda: replace(CODE, digest="sha256:" + "1" * 64))
    assert own_data(tmp_path).stages[0].fingerprint != base


def registered(store: Store, name: str, producer: Producer | None = None, text: str = "x") -> Artifact:
    staged = store.stage(name)
    (staged.content / "data.txt").write_text(text)
    return store.commit(staged, kind="data", producer=producer)


def test_a_finished_stage_is_reused_and_the_next_fingerprint_stays(tmp_path: Path) -> None:
    before = plan_of(tmp_path, "pipe")
    prep = before.stages[0]
    store = Store(tmp_path / "nemotron-output/store")
    made = registered(store, prep.outputs[0].name, Producer(prep.fingerprint, before.id, prep.name, "data"))
    after = plan_of(tmp_path, "pipe")
    assert after.stages[0].reused == made
    assert after.stages[1].inputs["data.path"] == made
    assert after.stages[1].fingerprint == before.stages[1].fingerprint
    assert lifecycle.prepare(request_of(tmp_path, "pipe")).rendered.stages[0].name == "sft"
    assert plan_of(tmp_path, "pipe", force=True).stages[0].reused is None


def test_latest_is_pinned_at_planning_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "nemotron-output/store")
    registered(store, "nano3-tiny-sft-data", text="one")
    plan = plan_of(tmp_path, "sft")
    registered(store, "nano3-tiny-sft-data", text="two")
    assert plan.stages[0].inputs["data.path"].version == 1
    assert plan_of(tmp_path, "sft").stages[0].inputs["data.path"].version == 2
    named = plan_of(tmp_path, "sft", overrides=("data.path=artifact:nano3-tiny-sft-data:v1",))
    assert named.stages[0].inputs["data.path"].label == "nano3-tiny-sft-data:v1"


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path: Path) -> None:
    assert "make it first: nemotron nano3 data prep sft -c tiny" in problems_of(tmp_path, "sft")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outputs.data='a b'", "'a b' can't be an artifact name"),
        ("outputs.data='../x'", "'../x' can't be an artifact name"),
        ("outputs.data=null", "'outputs.data' must name what the stage makes"),
        ("outputs.model=x", "this stage makes no model"),
    ],
)
def test_outputs_that_no_stage_could_register_are_refused_before_anything_runs(
    tmp_path: Path, override: str, message: str
) -> None:
    told = problems_of(tmp_path, "data", "prep", "sft", overrides=(override,))
    assert told.startswith(("outputs.data: " if "artifact name" in message else "") + message)
    assert f"from: command line {override}" in told


def test_a_pipe_has_no_placement_that_would_be_ignored(tmp_path: Path) -> None:
    file = tmp_path / "conf/recipe/nano3/pipe/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nkind: pipe\nrun: {nproc_per_node: 2}\nstages: [{stage: sft, config: tiny}]\n")
    assert "unknown key 'run'" in problems_of(tmp_path, "pipe", config="mine")


def test_processes_that_a_stage_would_not_use_are_refused_where_they_are_typed(tmp_path: Path) -> None:
    said = problems_of(tmp_path, "data", "prep", "sft", overrides=("run.nproc_per_node=2",))
    assert "this stage is one process: run.nproc_per_node=2 would change nothing" in said and "data.workers" in said
    said = problems_of(tmp_path, "pipe", overrides=("run.nproc_per_node=2",))
    assert "one process" not in said and "micro batches" in said, "a pipe is told once, for all its stages"


def test_an_import_is_one_thing_however_it_is_shared_out(tmp_path: Path) -> None:
    def print_of(commit: str, *overrides: str) -> str:
        model = f"model.path=hf://ORG/NAME@{commit * 40}"
        request = Request("convert", ("import",), "nano3", overrides=(model, *overrides), cwd=str(tmp_path))
        (stage,) = lifecycle.prepare(request).plan.stages
        assert stage.launch.launcher == ("torchrun" if overrides else "plain")
        assert stage.placement.nproc_per_node == (2 if overrides else 1)
        return stage.fingerprint

    one = print_of("a")
    assert print_of("a", "run.nproc_per_node=2", "parallel.expert_model_parallel_size=2") == one
    assert print_of("b") != one, "another revision is another model"


def test_overrides_of_a_pipe_reach_their_stage(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, "pipe", overrides=("sft.train.train_iters=7", "run.nproc_per_node=1", "~rl.optimizer.weight_decay")
    )
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["rl"].config["optimizer"]["weight_decay"] == 0.0
    assert str(stages["rl"].changed.get("optimizer.weight_decay", "")) in ("", "command line ~optimizer.weight_decay")
    assert stages["sft"].config["train"]["train_iters"] == 7


def test_wrong_overrides_of_a_pipe(tmp_path: Path) -> None:
    text = problems_of(
        tmp_path, "pipe", overrides=("train.train_iters=7", "sftt.train.seed=1", "sft.train.sede=1", "x")
    )
    assert "name the stage: rl.train.train_iters=7" in text
    assert "did you mean 'sft'?" in text
    assert "sft: unknown key 'train.sede'" in text
    assert "can't read override 'x'" in text


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    chats(tmp_path)
    for reference, fix in [
        ("chat.jsonl", "did you mean 'chats.jsonl'?"),
        ("nowhere/*.jsonl", "nowhere does not exist either"),
        ("sample:largest_of_tree", "did you mean 'largest_of_three'?"),
        ("hf://justone", "is not hf://ORG/NAME"),
        ("artifact:none", "nothing is registered there yet"),
    ]:
        overrides = (f"data.sources=[{{path: '{reference}'}}]", "data.tokenizer=tiny")
        text = problems_of(tmp_path, "data", "prep", "sft", config="default", overrides=overrides)
        assert fix in text, text
        assert "data.sources.0.path" in text


def test_hostile_file_names_arrive_unchanged(tmp_path: Path) -> None:
    for name in [
        "with space.jsonl",
        "it's.jsonl",
        "$(touch pwned).jsonl",
        "new\nline.jsonl",
        "ünï☃.jsonl",
        "a;b|c.jsonl",
    ]:
        (tmp_path / name).write_text(chats(tmp_path).read_text())
        quoted = name.replace("'", "\\'")
        plan = plan_of(
            tmp_path,
            "data",
            "prep",
            "sft",
            config="default",
            overrides=(f"data.sources=[{{path: '{quoted}'}}]", "data.tokenizer=tiny"),
        )
        assert plan.stages[0].inputs["data.sources.0.path"].uri == str(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_hub_reference_without_network_is_unpinned_and_not_submitted(tmp_path: Path) -> None:
    chats(tmp_path)
    prepared = lifecycle.prepare(
        request_of(
            tmp_path,
            "data",
            "prep",
            "sft",
            config="default",
            offline=True,
            overrides=("data.sources=[{path: chats.jsonl}]",),
        )
    )
    assert "UNPINNED" in prepared.plan.stages[0].inputs["data.tokenizer"].label
    with pytest.raises(UserError, match="UNPINNED"):
        lifecycle.submit(prepared)
    assert everything_below(tmp_path) == ["chats.jsonl"]
    resolver = Resolver(Store(tmp_path), tmp_path, lambda name: ())
    pinned = resolver.resolve("hf://org/name@" + "a" * 40, "model")
    assert pinned.revision == "a" * 40, "a commit needs no network"


def test_checkpoint_load_must_exist_and_be_whole(tmp_path: Path) -> None:
    registered(Store(tmp_path / "nemotron-output/store"), "nano3-tiny-sft-data")
    root = tmp_path / "checkpoints"
    (root / "iter_0000005").mkdir(parents=True)
    (root / "iter_0000005/weights").write_text("w")
    assert "no whole checkpoint at" in problems_of(tmp_path, "sft", overrides=("checkpoint.load=checkpoints",))
    assert "no whole checkpoint at" in problems_of(tmp_path, "sft", overrides=("checkpoint.load=nowhere",))
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    plan = plan_of(tmp_path, "sft", overrides=("checkpoint.load=checkpoints",))
    assert plan.stages[0].resume_from == str(root / "iter_0000005")
    assert str(root / "iter_0000005") in plan.stages[0].launch.files["train.yaml"]


def test_resume_finds_the_newest_unfinished_run_of_the_same_fingerprint(tmp_path: Path) -> None:
    registered(Store(tmp_path / "nemotron-output/store"), "nano3-tiny-sft-data")
    assert "no unfinished run" in problems_of(tmp_path, "sft", overrides=("train.resume=true",))
    first = plan_of(tmp_path, "sft")
    run = RunDir(Path(first.run_dir))
    checkpoint = run.stage("sft").checkpoints / "iter_0000010"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("10\n")
    run.plan.write_text(to_json(first))
    resumed = plan_of(tmp_path, "sft", overrides=("train.resume=true",))
    assert resumed.stages[0].resume_from == str(checkpoint)
    assert resumed.stages[0].fingerprint == first.stages[0].fingerprint
    assert "no unfinished run" in problems_of(tmp_path, "sft", overrides=("train.resume=true", "optimizer.lr=0.5"))
    write_record(run.stage("sft"), {"state": "succeeded"})
    assert "no unfinished run" in problems_of(tmp_path, "sft", overrides=("train.resume=true",))


def test_apply_refuses_what_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats(tmp_path)
    saved = own_data(tmp_path)
    assert lifecycle.reprepare(saved).plan == saved
    chats(tmp_path, "edited")
    with pytest.raises(UserError, match="input data.sources.0.path was"):
        lifecycle.reprepare(saved)
    chats(tmp_path)
    monkeypatch.setattr(planning, "describe_code", lambda: replace(CODE, digest="sha256:" + "1" * 64))
    with pytest.raises(UserError, match="the code changed"):
        lifecycle.reprepare(saved)
    monkeypatch.setattr(planning, "describe_code", lambda: CODE)
    mine = tmp_path / "conf/recipe/nano3/data/prep/sft"
    mine.mkdir(parents=True)
    (mine / "default.yaml").write_text(
        "# @package _global_\nkind: data_prep\nmethod: sft\ndata: {sources: '???', tokenizer: tiny, pack_size: 99}\n"
        "outputs: {data: nano3-sft-data}\n"
    )
    with pytest.raises(UserError, match="data.pack_size was 4096, is 99"):
        lifecycle.reprepare(saved)


def test_apply_refuses_a_plan_file_that_was_edited(tmp_path: Path) -> None:
    chats(tmp_path)
    saved = own_data(tmp_path)
    (stage,) = saved.stages
    files = {name: text.replace("pack_size: 4096", "pack_size: 64") for name, text in stage.launch.files.items()}
    for edited, told in (
        (replace(stage, launch=replace(stage.launch, files=files)), "launch.files.prep.yaml is not what"),
        (replace(stage, launch=replace(stage.launch, module="os")), "launch.module is not what"),
        (replace(stage, fingerprint="sha256:" + "2" * 64), "fingerprint is not what"),
        (replace(stage, config={**stage.config, "method": "dpo"}), "method was 'dpo', is 'sft'"),
    ):
        with pytest.raises(UserError, match=told):
            lifecycle.reprepare(replace(saved, stages=(edited,)))
    with pytest.raises(UserError, match="run_dir was /elsewhere"):
        lifecycle.reprepare(replace(saved, run_dir="/elsewhere"))


def test_apply_of_a_pipe_holds_when_its_first_stage_has_been_made_since(tmp_path: Path) -> None:
    saved = plan_of(tmp_path, "pipe")
    prep = saved.stages[0]
    store = Store(tmp_path / "nemotron-output/store")
    registered(store, prep.outputs[0].name, Producer(prep.fingerprint, "another-run", prep.name, "data"))
    assert lifecycle.reprepare(saved).plan == saved


@pytest.mark.parametrize("reason", [KeyboardInterrupt, UserError])
def test_an_interrupted_submission_is_recorded_as_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: type[BaseException]
) -> None:
    def interrupted(run_dir: Path, digest: Code, source: Path | None) -> None:
        raise reason

    monkeypatch.setattr(code, "snapshot", interrupted)
    prepared = lifecycle.prepare(request_of(tmp_path, "data", "prep", "sft"))
    with pytest.raises(reason):
        lifecycle.submit(prepared)
    assert lifecycle.load(Path(prepared.plan.run_dir)).state == "cancelled"


def test_what_is_no_reason_to_refuse_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remark = Problem("its tag may move", "profile desk", "pin it", refuses=False)
    heard: list[Problem] = []

    def tell(remarks: list[Problem]) -> None:
        assert not Path(prepared.plan.run_dir).exists()
        heard.extend(remarks)

    monkeypatch.setattr(LocalExecutor, "preflight", lambda self, plan, beside: [remark])
    monkeypatch.setattr(LocalExecutor, "submit", lambda self, plan, rendered: "the handle")
    monkeypatch.setattr(code, "snapshot", lambda run_dir, digest, source: None)  # `CODE` is nobody's
    prepared = lifecycle.prepare(request_of(tmp_path, "data", "prep", "sft"))
    assert lifecycle.submit(prepared, tell=tell) == "the handle"
    assert heard == [remark]
    worse = lifecycle.prepare(request_of(tmp_path, "data", "prep", "sft"))
    monkeypatch.setattr(LocalExecutor, "preflight", lambda self, plan, beside: [remark, Problem("no such image")])
    with pytest.raises(UserError) as refused:
        lifecycle.submit(worse, tell=tell)
    assert [problem.what for problem in refused.value.problems] == ["no such image"]
    assert not Path(worse.plan.run_dir).exists()


def test_an_artifact_of_another_kind_or_an_empty_reference_is_refused(tmp_path: Path) -> None:
    registered(Store(tmp_path / "nemotron-output/store"), "rows")
    told = problems_of(tmp_path, "sft", overrides=("model.path=artifact:rows", "data.path="))
    assert "model.path: rows:v1 is of kind 'data', not 'model'" in told
    assert "data.path: the reference is empty" in told
    (tmp_path / "no-model").mkdir()
    told = problems_of(tmp_path, "sft", overrides=("model.path=no-model", "~model.arch"))
    assert "no-model holds no config.json" in told
    (tmp_path / "no-model" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    told = problems_of(tmp_path, "sft", overrides=("model.path=no-model", "~model.arch"))
    assert "no-model holds BertForMaskedLM, which is no causal language model" in told
    (tmp_path / "no-model" / "config.json").write_text('{"architectures": ["OddForCausalLM"]}')
    assert "causal" not in problems_of(tmp_path, "sft", overrides=("model.path=no-model", "~model.arch"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"id": 5}'])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match="is not a plan"):
        lifecycle.load_plan(tmp_path / "plan.json")


def test_changed_values_name_their_layer(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "pipe", overrides=("sft.optimizer.lr=0.125",))
    sft = next(stage for stage in plan.stages if stage.name == "sft")
    assert str(sft.changed["optimizer.lr"]) == "command line sft.optimizer.lr=0.125"
    assert str(sft.changed["model.path"]) == "group model/tiny"
    assert str(sft.changed["train.train_iters"]) == "config recipe/nano3/sft/tiny"
    assert "optimizer.adam_beta1" not in sft.changed, "the same as in the base"
    assert not any(key.startswith("run.") for key in sft.changed)


def test_secrets_are_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "s3cr3t-value")
    (tmp_path / "env.toml").write_text('[desk]\nexecutor = "local"\nsecrets = ["PLANTED_TOKEN"]\n')
    prepared = lifecycle.prepare(request_of(tmp_path, "pipe", profile="desk", mode="run"))
    text = lifecycle.rendered_json(prepared)
    assert "PLANTED_TOKEN" in text
    assert "s3cr3t-value" not in text
    assert os.environ["PLANTED_TOKEN"] == "s3cr3t-value"


@pytest.mark.parametrize("form", ["plain", "base64", "inside base64", "URL", "JSON", "password"])
def test_a_secret_in_the_config_is_refused_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    secret = 'planted/secret+"4711"~x'
    monkeypatch.setenv("SOME_API_KEY", secret)
    written = {
        "plain": secret,
        "base64": base64.b64encode(secret.encode()).decode(),
        "inside base64": base64.b64encode(f"user:{secret}!".encode()).decode(),
        "URL": f"https://example.com/?key={quote(secret, safe='')}",
        "JSON": json.dumps({"key": secret}),
        "password": "https://user:another@example.com/x",
    }
    overrides = (f"run.env={{NOTE: {json.dumps(written[form], ensure_ascii=False)}}}",)
    told = problems_of(tmp_path, "data", "prep", "sft", overrides=overrides)
    assert (
        "a URL in the config holds a password" if form == "password" else "SOME_API_KEY stands in the config"
    ) in told
    assert secret not in told


def test_a_url_without_a_password_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted/secret")
    plan_of(tmp_path, "data", "prep", "sft", overrides=("run.env={NOTE: https://example.com/a:b@c}",))


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "db_password", "AWS_SECRET_ACCESS_KEY"])
def test_what_reads_like_a_secret_is_not_kept_in_plain_text(tmp_path: Path, name: str) -> None:
    overrides = (f"run.env={{{name}: abc, TOKENIZERS_PARALLELISM: x}}",)
    told = problems_of(tmp_path, "data", "prep", "sft", overrides=overrides)
    assert told.count("reads like a secret") == 1 and name in told


def test_a_folder_that_no_plan_could_name_is_refused(tmp_path: Path) -> None:
    told = problems_of(tmp_path / "bad\udcff", "data", "prep", "sft", config_dirs=("mine\udcff",))
    assert "the current folder" in told and "the --config-dir 'mine\\udcff' is not valid UTF-8" in told


def test_the_code_travels_as_it_lies_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nemotron_recipes"
    (package / "worker").mkdir(parents=True)
    (package / "worker/a.py").write_text("A = 1\n")
    (package / "notes.md").write_text("left here")
    (package / "big.json").write_text(" " * (code.LARGEST + 1))
    monkeypatch.setattr(code, "PACKAGE", package)
    described = code.describe_code()
    assert described.left_behind == ("big.json: larger than 1000000 bytes", "notes.md: no source file")
    code.snapshot(tmp_path / "run", described)
    (package / "worker/a.py").write_text("A = 2\n")
    assert (tmp_path / "run/code/nemotron_recipes/worker/a.py").read_text() == "A = 1\n", "later edits stay out"
    assert sorted(everything_below(tmp_path / "run/code/nemotron_recipes")) == ["worker", "worker/a.py"]
    copied = (tmp_path / "run/code/nemotron_recipes/worker/a.py").stat().st_ino
    code.snapshot(tmp_path / "run", described)
    assert (tmp_path / "run/code/nemotron_recipes/worker/a.py").stat().st_ino == copied, "copied once"
    with pytest.raises(UserError, match="changed while"):
        code.snapshot(tmp_path / "other", described)


def test_the_patch_holds_untracked_files_but_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    package = tmp_path / "nemotron_recipes"
    package.mkdir()
    (package / "a.py").write_text("A = 1\n")
    git("init", "-q")
    git("config", "core.trustctime", "false")
    long_ago = (1e9, 1e9)  # everything within one second, as when an editor is quick
    os.utime(package / "a.py", long_ago)
    git("add", ".")
    git("commit", "-qm", "a")
    monkeypatch.setattr(code, "PACKAGE", package)
    assert not code.git_diff()
    (package / "a.py").write_text("A = 2\n")
    for path in (package / "a.py", tmp_path / ".git/index"):
        os.utime(path, long_ago)
    (package / ":(top)new.py").write_text("NEW = 1\n")
    (tmp_path / "data.bin").write_bytes(bytes(code.LARGEST + 1))
    for name in (".env", "id_rsa", "server.pem"):
        (tmp_path / name).write_text("hidden")
    index = (tmp_path / ".git/index").read_bytes()
    patch = code.git_diff() or ""
    assert "+A = 2" in patch and "+NEW = 1" in patch and "hidden" not in patch and "data.bin" not in patch
    assert (tmp_path / ".git/index").read_bytes() == index, "the checkout's own index stays as it is"
    git("stash", "-q")
    (package / ":(top)new.py").unlink()
    (tmp_path / "x.patch").write_text(patch)
    git("apply", "x.patch")
    assert (package / "a.py").read_text() == "A = 2\n" and (package / ":(top)new.py").read_text() == "NEW = 1\n"


def test_a_dirty_checkout_can_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats(tmp_path)
    assert own_data(tmp_path, overrides=("code.require_clean=true",))
    monkeypatch.setattr(planning, "describe_code", lambda: replace(CODE, uncommitted=("nemotron_recipes/spec.py",)))
    with pytest.raises(UserError, match="uncommitted changes: nemotron_recipes/spec.py"):
        own_data(tmp_path, overrides=("code.require_clean=true",))
    plan = own_data(tmp_path)
    assert plan.stages[0].launch.env["PYTHONPATH"].split(":")[0] == f"{plan.run_dir}/code"
