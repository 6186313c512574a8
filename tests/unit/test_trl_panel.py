"""A panel of judges as a reward, against servers that speak OpenAI's protocol."""

from __future__ import annotations

import json

import pytest

from nemotron_recipes.errors import JobFailed, UserError
from nemotron_recipes.worker.trl.panel import Panel, WeightedJudge, judged, read_panel, reward
from tests.helpers.judge_server import judge_server

JUDGE = {"name": "a", "base_url": "http://x/v1", "model": "m"}


def panel_of(*weights, url="http://127.0.0.1:1/v1", **settings):
    judges = [
        WeightedJudge(name=f"j{n}", base_url=url, model=f"m{n}", tries=1, timeout=60.0, weight=weight)
        for n, weight in enumerate(weights)
    ]
    return Panel(judges=judges, **settings)


@pytest.mark.parametrize(
    ("settings", "scores", "expected"),
    [
        ({}, [1.0, 1.0], 0.0),
        ({}, [10.0, 10.0], 1.0),
        ({}, [4.0, 7.0], 5 / 9),  # weights 1 and 2: a mean of 6
        ({}, [None, 7.0], None),  # all must score unless a quorum is named
        ({"quorum": 1}, [None, 7.0], 6 / 9),
        ({"quorum": 1}, [None, None], None),
        ({"max_spread": 3.0}, [4.0, 7.0], 5 / 9),
        ({"max_spread": 2.0}, [4.0, 7.0], 3 / 9),
        ({"max_spread": 2.0, "on_disagreement": "mean"}, [4.0, 7.0], 5 / 9),
        ({"max_spread": 2.0, "on_disagreement": "leave_out"}, [4.0, 7.0], None),
    ],
)
def test_what_scores_come_to(settings, scores, expected):
    found = reward(panel_of(1.0, 2.0, **settings), scores)
    assert found == (None if expected is None else pytest.approx(expected))


def test_every_judge_is_asked_about_every_completion():
    logged = {}
    models = {"m0": lambda prompt, before: '{"score": 4}', "m1": lambda prompt, before: '{"score": 10}'}
    with judge_server(models) as (url, requests):
        found = judged(
            *(["an answer", "ein zweiter: größer"], ["a question", "eine Frage"]),
            panel=panel_of(1.0, 1.0, url=url, max_spread=5.0),
            log_metric=logged.__setitem__,
        )
    assert found == [pytest.approx(3 / 9)] * 2
    assert logged == {"judges/disagreed": 1.0, "judges/missing": 0.0}
    assert len(requests) == 4 and sum("ein zweiter" in request["prompt"] for request in requests) == 2
    assert all("a question" in r["prompt"] or "eine Frage" in r["prompt"] for r in requests)


def test_a_judge_that_is_out_of_order():
    """Within the quorum the others decide, and it is counted; below it the run ends with words."""
    models = {"m0": lambda prompt, before: '{"score": 7}', "m1": lambda prompt, before: (503, {})}
    logged = {}
    with judge_server(models) as (url, _):
        some = panel_of(1.0, 5.0, url=url, quorum=1)
        assert judged(["a"], ["q"], panel=some, log_metric=logged.__setitem__) == [pytest.approx(6 / 9)]
        assert logged["judges/missing"] == 1.0
        with pytest.raises(JobFailed, match="2 judges must reply, and 1 did: judge j1 .* status 503"):
            judged(["a"], ["q"], panel=panel_of(1.0, 5.0, url=url))


def test_a_judge_that_is_too_slow_counts_as_missing():
    import threading

    over = threading.Event()

    def late(prompt, before):
        over.wait(120)
        return '{"score": 1}'

    with judge_server({"m0": lambda prompt, before: '{"score": 10}', "m1": late}) as (url, _):
        slow = WeightedJudge("slow", url, "m1", tries=1, timeout=0.5)
        panel = Panel(judges=[*panel_of(1.0, url=url).judges, slow], quorum=1)
        assert judged(["a"], ["q"], panel=panel) == [1.0]
        over.set()


@pytest.mark.parametrize("status", [503, 401])
def test_once_the_run_must_end_nobody_is_asked_about_the_rest(status):
    with judge_server({"m0": lambda prompt, before: (status, {})}) as (url, requests):
        with pytest.raises((JobFailed, UserError), match=f"status {status}"):
            judged(["a"] * 200, ["q"] * 200, panel=panel_of(1.0, url=url))
        assert len(requests) < 200


def test_a_judge_that_refuses_ends_the_run_at_once():
    with judge_server({"m0": lambda prompt, before: (401, {})}) as (url, requests):
        with pytest.raises(UserError, match="refuses: status 401"):
            judged(["a"], ["q"], panel=panel_of(1.0, url=url))
        assert len(requests) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quorum": 2}, "quorum 2 is more than there are judges"),
        ({"on_disagreement": "ignore"}, "on_disagreement"),
        ({"max_spred": 1.0}, "max_spread"),
        ({"judges": [{**JUDGE, "weight": 0.0}]}, "weight"),
        ({"judges": [{**JUDGE, "api_key_env": "NO_SUCH_KEY"}]}, "NO_SUCH_KEY"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, change, words):
    whole = {"judges": [JUDGE]}
    path = tmp_path / "judges.yaml"
    path.write_text(json.dumps(whole | {"quorum": 1, "max_spread": 4.0}))
    assert read_panel(path).judges[0].weight == 1.0
    path.write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match=words):
        read_panel(path)
