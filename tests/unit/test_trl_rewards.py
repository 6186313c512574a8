"""Verifiable rewards: what counts as the final answer, and when two answers are one."""

import json
import signal

import pytest

from nemotron_recipes.backends.trl import REWARDS as KNOWN_TO_THE_PLANNER
from nemotron_recipes.errors import UserError
from nemotron_recipes.worker.trl import patience
from nemotron_recipes.worker.trl.config import RewardSettings, TrlSettings
from nemotron_recipes.worker.trl.rewards import REWARDS, check_rows, exact_match, final_answer, matches, rewards_named


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("85", "85"),
        ("The sum is 3 + 4 = 7.", "7"),
        ("48/2 = <<48/2=24>>24 clips\n#### 72", "72"),
        ("#### 5\nno, wait\n#### 6 ", "6"),
        (r"so \boxed{\frac{1}{2}} as 3 shows", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"an open \boxed{3", "3"),
        ("<think>it is 12</think>13", "13"),
        ("<think>it is 12", "12"),
        ("<think>only 12</think>", None),
        ("yes", "yes"),
        ("-1,234.50 dollars", "-1,234.50"),
        ("   ", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("completion", "expected", "right"),
    [
        ("85", "85", True),
        ("85", "58", False),
        ("085", "85", True),
        ("It costs $1,200.", "1200", True),
        ("1200.00", "1,200", True),
        ("0.50", ".5", True),
        ("-0", "0", True),
        ("Paris.", "paris", True),
        ("", "0", False),
        ("8 5", "85", False),
        ("9" * 400, "9" * 400, True),
        ("1e999999999", "1e999999999", False),  # the last number is 999999999; nothing of that size is computed
        ("nan", "nan", True),
    ],
)
def test_matches(completion, expected, right):
    assert matches(completion, expected) is right


def test_a_number_of_any_length_is_compared_exactly():
    """A completion that repeats a digit to its end must not end the training."""
    long = "7" * 6000
    assert matches(long, long) and matches(f"{long}.50", f"{long}.5") and not matches(long, long[:-1] + "8")
    assert matches("9" * 1_100_000 + ".5", "1") is False
    assert matches("-0.0", "0") and matches("+5", "5") and matches(".50", "0.5") and matches("100", "1e2") is False


def test_trl_interface_takes_text_and_messages():
    completions = ["7", [{"role": "assistant", "content": "it is 8"}]]
    assert exact_match(completions, ["7", "7"], prompts=["", ""]) == [1.0, 0.0]


def settings_for(*names, **settings):
    return TrlSettings("grpo", {}, rewards=list(names), reward_settings=RewardSettings(**settings))


def test_names():
    named = rewards_named(settings_for("exact_match", "json_schema"))
    assert [function.__name__ for function in named] == ["exact_match", "json_schema"]
    assert named[0](completions=["it is 7"], expected_answer=["7"], extra=["{}"], prompts=[""]) == [1.0]
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        rewards_named(settings_for("exact_mach"))


def test_a_format_is_about_the_whole_completion():
    (function,) = rewards_named(settings_for("format", format_pattern=r".*</think>\s*\d+"))
    texts = ["it is\n7</think> 7", "</think>7", "</think>seven", "7", "</think>7 or so"]
    assert function(completions=texts, prompts=texts) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_json_is_held_against_the_schema_of_its_row():
    (function,) = rewards_named(settings_for("json_schema"))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    texts = {
        '{"n": 7}': 1.0,
        'I think {</think>```json\n{"n": 7}\n```': 1.0,
        '```json\n{"n": 7}\n```\nor\n```\n{"n": "7"}\n```': 0.0,  # the last one counts
        '{"n": "7"}': 0.0,
        '{"n": 7} and so on': 0.0,
        "[" * 100_000: 0.0,
        "": 0.0,
    }
    extra = [json.dumps({"schema": schema})] * len(texts)
    assert function(completions=list(texts), extra=extra) == list(texts.values())
    as_text = [json.dumps({"schema": json.dumps(schema)})]
    assert function(completions=['{"n": 1}'], extra=as_text) == [1.0]


def test_a_completion_on_which_a_pattern_does_not_end_earns_nothing(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGALRM)
    (schema,) = rewards_named(settings_for("json_schema"))
    (form,) = rewards_named(settings_for("format", format_pattern="(a+)+b"))
    extra = [json.dumps({"schema": {"type": "string", "pattern": "^(a+)+$"}})]
    monkeypatch.setattr(patience, "SECONDS", 600.0)
    assert schema(completions=['"aaa"'], extra=extra) == form(completions=["aab"]) == [1.0]
    monkeypatch.setattr(patience, "SECONDS", 0.2)
    assert schema(completions=[f'"{"a" * 50}!"'], extra=extra) == form(completions=["a" * 50]) == [0.0]
    assert capsys.readouterr().out.count("took longer than 0.2 s") == 2
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    blanks = " " * 200_000
    assert final_answer(f"#### 4\n####{blanks}7{blanks}8 \nand more") == f"7{blanks}8"
    assert final_answer(f"#### 4{blanks}####{blanks}") == "4"


def test_a_schema_leads_to_no_other_place():
    (function,) = rewards_named(settings_for("json_schema"))
    with pytest.raises(UserError, match="refers to something outside"):
        function(completions=["{}"], extra=[json.dumps({"schema": {"$ref": "http://127.0.0.1:1/schema.json"}})])


def test_code_is_the_last_block_of_the_answer():
    (function,) = rewards_named(settings_for("code_tests", code_seconds=60.0))
    tests = json.dumps({"tests": "assert double(4) == 8"})
    good = "```python\ndef double(n):\n    return 2 * n\n```"
    bad = good.replace("2 * n", "n")
    texts = [f"{bad}\nno:\n{good}", f"{good}\nno:\n{bad}", f"{good}</think>I don't know", good + "\nThere."]
    assert function(completions=texts, extra=[tests] * 4) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "extra", "words"),
    [
        ("code_tests", {}, "there is no 'tests'"),
        ("code_tests", {"tests": [{"input": "4"}]}, "no list of"),
        ("code_tests", {"tests": []}, "no list of"),
        ("json_schema", {"schema": {"type": "objekt"}}, "is no JSON schema"),
        ("json_schema", {"schema": "{"}, "is no JSON schema"),
        ("json_schema", {"schema": 5}, "neither an object nor true or false, but 5"),
        ("json_schema", {"schema": ["object"]}, "neither an object nor true or false"),
        ("json_schema", {"schema": {"$schema": 5}}, "is no JSON schema"),
    ],
)
def test_rows_that_a_reward_cannot_use_are_found_before_training(reward, extra, words):
    fine = {"extra": {"tests": "assert True", "schema": {}}}
    check_rows([reward, "exact_match"], [fine, fine])
    with pytest.raises(UserError, match=f"can't use 1 of 2 rows: in row 2 .*{words}"):
        check_rows([reward], [fine, {"extra": extra}])


def test_the_planner_knows_the_same_names():
    assert set(REWARDS) == KNOWN_TO_THE_PLANNER
