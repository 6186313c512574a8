"""Verifiable rewards: what counts as the final answer, and when two answers are one."""

import pytest

from nemotron_recipes.backends.trl import REWARDS as KNOWN_TO_THE_PLANNER
from nemotron_recipes.errors import UserError
from nemotron_recipes.worker.trl.rewards import REWARDS, exact_match, final_answer, matches, rewards_named


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


def test_trl_interface_takes_text_and_messages():
    completions = ["7", [{"role": "assistant", "content": "it is 8"}]]
    assert exact_match(completions, ["7", "7"], prompts=["", ""]) == [1.0, 0.0]


def test_names():
    assert rewards_named(["exact_match"]) == [exact_match]
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        rewards_named(["exact_mach"])


def test_the_planner_knows_the_same_names():
    assert set(REWARDS) == KNOWN_TO_THE_PLANNER
