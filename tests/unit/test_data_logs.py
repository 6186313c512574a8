"""Rows from conversation logs: thresholds, judges over HTTP, calibration and agreement."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from nemotron_recipes.data import agreement
from nemotron_recipes.data.exchanges import Limits
from nemotron_recipes.data.from_logs import Request, from_logs
from nemotron_recipes.data.judges import Client, Judge, read_ensemble, read_score
from nemotron_recipes.errors import JobFailed, UserError
from tests.helpers.cli import nemotron
from tests.helpers.data_prep import read_row, write_rows
from tests.helpers.judge_server import judge_server


def log(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def make(tmp_path: Path, rows: list[Any], target: str, good: float = 7, bad: float | None = 3, **more: Any) -> Any:
    """(rows, report)."""
    out = tmp_path / f"{target}.jsonl"
    logs, limits = write_rows(tmp_path / "logs.jsonl", rows), Limits(good, bad, more.pop("margin", 0))
    request = Request((logs,), target, out, limits, **{"score_field": "score", **more})
    report = from_logs(request)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert report["exchanges"] == report["used"] + sum(
        count for reason, count in report["left_out"].items() if reason not in LINES
    )
    assert len(found) == report["rows"]
    for row in found:  # what data prep reads
        read_row(row, target)
    return found, report


LINES = {"invalid_json", "not_an_object", "missing_field", "wrong_type", "unknown_role", "bad_order", "no_assistant",
         "streamed_chunk"}  # fmt: skip


def test_sft_rows_are_those_above_the_threshold(tmp_path: Path) -> None:
    rows = [log("a", "good", score=7, license="MIT"), log("b", "poor", score=6.5), log("c", "unknown"), {"x": 1}, [1]]
    found, report = make(tmp_path, rows, "sft")
    assert found == [log("a", "good", score=7.0, license="MIT")]  # other fields stay: gates ask for them
    assert report["left_out"] == {"low_score": 1, "missing_field": 1, "no_score": 1, "not_an_object": 1}
    assert report["lines"] == 5


def test_what_has_no_answer_or_no_number_is_counted(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Q"}]
    chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "A"}}]}
    odd = [log("b", "x", score=score) for score in (float("nan"), 1e999, 10**400)]
    chunks = [chunk, {"request": {"messages": asked}, "response": chunk}]
    rows = [log("a", "good", score=7), *odd, *chunks, {"messages": asked, "choices": []}]
    found, report = make(tmp_path, rows, "sft")
    assert [row["messages"][-1]["content"] for row in found] == ["good"]
    assert report["left_out"] == {"no_assistant": 1, "no_score": 3, "streamed_chunk": 2}


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_packed_logs(tmp_path: Path, name: str, pack: Any) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", [log(str(n), "good", score=8) for n in range(50)]).read_bytes()
    (tmp_path / name).write_bytes(pack(plain))
    report = from_logs(Request((tmp_path / name,), "sft", tmp_path / "out.jsonl", Limits(7), "score"))
    assert (report["lines"], report["rows"]) == (50, 50)
    (tmp_path / name).write_bytes(pack(plain)[:-9])
    with pytest.raises(UserError, match="damaged or cut off"):
        from_logs(Request((tmp_path / name,), "sft", tmp_path / "cut.jsonl", Limits(7), "score"))
    assert not (tmp_path / "cut.jsonl").exists()


def test_kto_rows_are_good_or_bad(tmp_path: Path) -> None:
    rows = [log("a", "good", score=9), log("b", "middling", score=5), log("c", "bad", score=3)]
    found, report = make(tmp_path, rows, "kto")
    assert [(row["completion"][0]["content"], row["label"]) for row in found] == [("good", True), ("bad", False)]
    assert report["left_out"] == {"neither_good_nor_bad": 1}


def test_pairs_are_the_best_and_the_worst_answer(tmp_path: Path) -> None:
    rows = [
        *(log("a", text, score=score) for text, score in (("fair", 5), ("best", 9), ("bad", 1), ("also best", 9))),
        log("alone", "x", score=9),
        *(log("close", text, score=score) for text, score in (("x", 8), ("y", 7.5))),
        *(log("poor", text, score=score) for text, score in (("x", 5), ("y", 1))),
        *(log("same", "x", score=score) for score in (9, 1)),
    ]
    found, report = make(tmp_path, rows, "dpo", bad=None, margin=2)
    (pair,) = found
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("best", "bad")
    assert (pair["score"], pair["rejected_score"]) == (9, 1)
    assert report["left_out"] == {
        "between_best_and_worst": 2, "low_score": 2, "no_other_answer": 1, "same_pair": 2, "too_close": 2
    }  # fmt: skip
    _, report = make(tmp_path, [*rows[:4], *rows[5:7]], "dpo", bad=3)
    assert report["left_out"] == {"between_best_and_worst": 2, "no_bad_answer": 2}


def test_requests_and_responses_as_an_api_logs_them(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    asked = {
        "model": "m",
        "messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": "Q"}],
        "tools": [tool],
    }
    choices = [{"index": n, "message": {"role": "assistant", "content": f"A{n}"}, "score": 10 * n} for n in range(2)]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [
        {"request": asked, "response": {"choices": choices}, "id": 7},
        {"request": asked, "response": {"choices": [{"message": calling}]}, "score": 8},
        {"messages": asked["messages"], "choices": choices, "score": 9},  # the score of which one?
    ]  # fmt: skip
    found, report = make(tmp_path, rows, "sft", good=5)
    assert [row["messages"][-1]["content"] for row in found] == ["A1", None, "A1"]
    assert found[0]["tools"] == [tool]
    assert found[0]["id"] == 7
    assert report["exchanges"] == 5
    pairs, _ = make(tmp_path, rows[:1], "dpo", good=5)
    assert (pairs[0]["chosen"][0]["content"], pairs[0]["rejected"][0]["content"]) == ("A1", "A0")


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "assistant", "content": "a"}], "score": 9},
    {"messages": [{"role": "user", "content": "a"}], "score": 9},
    {"messages": [{"role": "critic", "content": "a"}, {"role": "assistant", "content": "b"}], "score": 9},
    {"messages": [{"role": "user", "content": "a"}], "choices": "x", "score": 9},
    {"messages": [{"role": "user", "content": "a"}], "choices": [{}], "score": 9},
    {"messages": [{"role": "user", "content": "a"}], "choices": [{"message": {"role": "user", "content": "b"}}]},
    {"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}], "score": 9},
])  # fmt: skip
def test_lines_that_are_no_exchange_are_counted(tmp_path: Path, row: Any) -> None:
    found, report = make(tmp_path, [row, log("a", "b", score=9)], "sft")
    assert len(found) == 1
    assert sum(report["left_out"].values()) == 1


def test_nothing_is_written_where_nothing_is_good(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing became a row.*1 low_score"):
        make(tmp_path, [log("a", "b", score=1)], "sft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.jsonl"]


# --- judges ---


def judges_file(tmp_path: Path, url: str, *models: str, **fields: Any) -> Path:
    judges = [{"name": name, "base_url": url, "model": name, **fields} for name in models]
    path = tmp_path / "judges.yaml"
    path.write_text(json.dumps({"judges": judges}))
    return path


def quality(prompt: str) -> int:
    """What the answer in the question is worth."""
    return int(re.findall(r"worth (\d+)", prompt)[-1])


def test_an_ensemble_judges_and_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strict judge is two points lower; nobody loses by that. A noisy one shows in the figures."""
    monkeypatch.setenv("THE_KEY", "secret-value-123")
    models = {
        "fair": lambda prompt, n: f'{{"score": {quality(prompt)}}}',
        "strict": lambda prompt, n: f'Well. {{"score": 1}} no: {{"score": {max(1, quality(prompt) - 2)}, "why": "x"}}',
        "mute": lambda prompt, n: "I'd rather not say." if quality(prompt) % 2 else f'{{"score": {quality(prompt)}}}',
    }
    rows = [log(f"q{n}", f"worth {3 + n % 7}", people=3 + n % 7) for n in range(30)]
    with judge_server(models) as (url, requests):
        ensemble = read_ensemble(judges_file(tmp_path, url, *models, api_key_env="THE_KEY"))
        for people in (None, "people"):
            found, report = make(
                tmp_path, rows, "sft", good=8, score_field=None, ensemble=ensemble, people_field=people
            )
            figures = report["agreement"]
            assert {name: one["scored"] for name, one in figures["judges"].items()} == {
                "fair": 30, "strict": 30, "mute": sum((3 + n % 7) % 2 == 0 for n in range(30))
            }  # fmt: skip
            assert figures["pairs"][0]["spearman"] == 1.0
            assert figures["krippendorff_alpha"] > 0.9
            assert {row["scores"]["fair"] - row["scores"]["strict"] for row in found} == {2.0}
            assert all(row["agreement"] > 0.7 for row in found)
        assert [row["score"] for row in found] == pytest.approx([row["people"] for row in found], abs=1e-3)
        assert {row["people"] for row in found} == {8, 9}
        assert figures["judges"]["strict"]["slope"] == pytest.approx(1)
        assert figures["judges"]["strict"]["intercept"] == pytest.approx(2)
        assert figures["judges"]["strict"]["people_mean_difference"] == pytest.approx(0, abs=1e-3)
    assert len(requests) == 90  # the second run had the journal
    assert {one["authorization"] for one in requests} == {"Bearer secret-value-123"}
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret-value" not in written


def test_a_judge_that_always_says_the_same_counts_for_nothing(tmp_path: Path) -> None:
    models = {"fair": lambda prompt, n: f'{{"score": {quality(prompt)}}}', "tens": lambda prompt, n: '{"score": 10}'}
    rows = [log(f"q{n}", f"worth {3 + n % 7}") for n in range(14)]
    with judge_server(models) as (url, _):
        for judges, constant, scores in ((("fair", "tens"), ["tens"], {8.0, 9.0}), (("tens",), [], {10.0})):
            ensemble = read_ensemble(judges_file(tmp_path, url, *judges))
            found, report = make(tmp_path, rows, "sft", good=8, score_field=None, ensemble=ensemble)
            figures = report["agreement"]["judges"]
            assert [name for name in judges if figures[name]["constant"]] == constant
            assert {row["score"] for row in found} == scores
            assert all(row["scores"]["tens"] == 10 for row in found)
            assert not any("agreement" in row for row in found), "one judge that says something agrees with nobody"


def test_a_run_that_was_stopped_asks_only_what_is_new(tmp_path: Path) -> None:
    rows = [log(f"q{n}", "x") for n in range(70)]  # more than a block
    healthy: list[bool] = []

    def moody(prompt: str, before: int) -> Any:
        return (400, {}) if '"q66"' in prompt and not healthy else '{"score": 9}'

    with judge_server({"a": moody}) as (url, requests):
        ensemble = read_ensemble(judges_file(tmp_path, url, "a"))
        with pytest.raises(UserError, match="judge a refuses: status 400"):
            make(tmp_path, rows, "sft", score_field=None, ensemble=ensemble)
        assert not (tmp_path / "sft.jsonl").exists()
        with (tmp_path / "sft.jsonl.judged.jsonl").open("a") as journal:
            journal.write('{"key": "cut o')  # as a crash leaves it
        before = len(requests)
        healthy.append(True)
        found, _ = make(tmp_path, rows, "sft", score_field=None, ensemble=ensemble)
        assert len(found) == 70
        assert len(requests) - before <= 6  # those of the second block
        after = len(requests)
        make(tmp_path, rows, "sft", score_field=None, ensemble=ensemble)
        assert len(requests) == after


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_judge_is_asked_again(status: int) -> None:
    waits: list[float] = []
    answer = {"m": lambda prompt, n: (status, {"Retry-After": "7"}) if n < 2 else '{"score": 4}'}
    with judge_server(answer) as (url, requests):
        client = Client(Judge("j", url, "m"), waits.append)
        assert client.score("Q") == 4
        client.close()
    assert len(requests) == 3
    assert waits.count(7.0) == 2  # what the server asked for
    assert all(wait <= 60 for wait in waits)


def test_a_silent_judge_ends_the_run(tmp_path: Path) -> None:
    with judge_server({"m": lambda prompt, n: (503, {})}) as (url, requests):
        with pytest.raises(JobFailed, match="no reply in 3 tries: status 503"):
            Client(Judge("j", url, "m", tries=3), lambda seconds: None).score("Q")
        assert len(requests) == 3
    with socket.socket() as listening:  # takes connections, says nothing
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(JobFailed, match=r"no reply in 2 tries: .*timed out"):
            Client(Judge("j", url, "m", tries=2, timeout=0.2), lambda seconds: None).score("Q")
    with pytest.raises(JobFailed, match="no reply in 1 tries"):  # nobody listens any more
        Client(Judge("j", url, "m", tries=1), lambda seconds: None).score("Q")


def test_a_judge_that_keeps_its_connection_busy_has_no_longer() -> None:
    """Some endpoints send blanks until the reply is ready: its time is that of the whole reply, not of each piece."""
    whole = json.dumps({"choices": [{"message": {"content": '{"score": 3}'}}]}).encode()
    given_up = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # whoever asked has gone
                for _ in range(400):  # 20 s
                    self.wfile.write(b" ")
                    if given_up.wait(0.05):
                        return
                self.wfile.write(whole)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/v1"
            with pytest.raises(JobFailed, match="no reply in 1 tries: (the reply is not whole in time|timed out)"):
                Client(Judge("j", url, "m", tries=1, timeout=0.5)).score("Q")
        finally:
            given_up.set()
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [(200, {"Content-Encoding": "gzip"}, "decompressing"), (429, {"Retry-After": "²"}, "status 429")],
)
def test_a_reply_that_breaks_the_protocol_is_no_reply(status: int, headers: dict[str, str], words: str) -> None:
    failed = pytest.raises(JobFailed, match=f"no reply in 2 tries: .*{words}")
    with judge_server({"m": lambda prompt, n: (status, headers)}) as (url, _), failed:
        Client(Judge("j", url, "m", tries=2), lambda seconds: None).score("Q")


@pytest.mark.parametrize(("content", "score"), [
    ('{"score": 7}', 7), ('```json\n{"score": 7.5, "why": "x"}\n```', 7.5), ('{"score": 2} or {"score": 3}', 3),
    ('{"score": 4, "why": "a {b} c"}', 4), ('{"score": 1e1}', None), ('{"score": 7/10}', None),
    ('{"score": nan}', None), ([{"type": "text"}], None),
    ('<think>{"score": 2}?</think> It is {"score": 5}', 5), ('<think>{"score": 2}?</think> It is bad', None),
    ('{"score": 11}', None), ('{"score": 0}', None), ('{"score": "7"}', None), ("7", None), ("", None), (None, None),
])  # fmt: skip
def test_scores_are_read_strictly(content: Any, score: float | None) -> None:
    assert read_score(json.dumps({"choices": [{"message": {"content": content}}]})) == score


@pytest.mark.parametrize("reply", [
    "", "{", pytest.param("[" * 100_000, id="deep"), "[]", "{}", '{"choices": []}', '{"choices": [{"message": null}]}',
])  # fmt: skip
def test_odd_replies_hold_no_score(reply: str) -> None:
    assert read_score(reply) is None


@pytest.mark.parametrize(("text", "message"), [
    ("judges: []", "at least 1"),
    ("judges: [{name: a, base_url: 'http://x', model: m, api_key: s}]", "did you mean 'api_key_env'"),
    ("judges: [{name: a, base_url: 'x', model: m}]", "is no http"),
    *((f"judges: [{{name: a, base_url: '{address}', model: m}}]", "is no http") for address in (
        "http://x:port/v1", "http://[::1/v1", "http:///v1", "http://x/v1 ", f"http://{'a' * 70}.x/v1")),
    ("judges: [{name: a, base_url: 'http://me:password@x/v1', model: m}]", "holds a user or a password"),
    ("judges: [{name: a, base_url: 'http://x', model: m, api_key_env: NO_SUCH}]", "NO_SUCH is not set"),
    ("judges: [{name: a, base_url: 'http://x', model: m}, {name: a, base_url: 'http://x', model: n}]", "two judges"),
    ("judges: [", "can't be read"),
    ("- a", "a section is expected"),
])  # fmt: skip
def test_a_wrong_judges_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "judges.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        read_ensemble(tmp_path / "judges.yaml")
    assert "me:password" not in str(refused.value)


@pytest.mark.parametrize("key", ["the-key\n", "the-key\r", "the-kéy", " the-key"])
def test_a_key_that_no_request_can_carry_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(UserError, match="A_KEY holds a line end") as refused:
        read_ensemble(judges_file(tmp_path, "http://x/v1", "m", api_key_env="A_KEY"))
    assert "the-k" not in str(refused.value)


# --- figures ---


def test_krippendorffs_alpha() -> None:
    """The example of Krippendorff's "Computing Krippendorff's Alpha-Reliability" (2011): 0.849 for intervals."""
    nan = np.nan
    data = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]).T  # fmt: skip
    assert agreement.krippendorff(data) == pytest.approx(0.849, abs=5e-4)
    assert agreement.krippendorff(np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])) == 1.0
    assert agreement.krippendorff(np.array([[1.0, nan]])) is None


def test_spearman() -> None:
    a = np.array([1.0, 2, 2, 4, 9])
    assert agreement.spearman(a, a**3) == 1.0
    assert agreement.spearman(a, -a) == -1.0
    assert agreement.spearman(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert agreement.spearman(a, np.ones(5)) is None


def test_agreement_is_the_distance_between_judges() -> None:
    level = np.array([[5.0, 5.0, np.nan], [1.0, 10.0, 5.0], [3.0, 5.25, np.nan], [4.0, np.nan, np.nan], [np.nan] * 3])
    assert agreement.agreement(level, 9.0)[:3].tolist() == [1.0, 0.0, 0.75]
    assert np.isnan(agreement.agreement(level, 9.0)[3:]).all()


# --- the command ---


def test_from_the_command_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "logs.jsonl", [log("a", "good", meta={"score": 9}), log("b", "bad", meta={"score": 1})])
    command = ("data", "from-logs", "logs.jsonl", "--to", "kto", "--out", "kto.jsonl", "--score-field", "meta.score")
    nemotron(tmp_path, *command, "--min-score", "7", code=2)  # what is bad?
    shown = nemotron(tmp_path, *command, "--min-score", "7", "--max-score", "3")
    assert "2 lines, 2 answers; 2 kto rows in kto.jsonl" in shown
    assert json.loads((tmp_path / "kto.jsonl.report.json").read_text())["rows"] == 2
    nemotron(tmp_path, *command, "--min-score", "7", "--max-score", "3", code=2)  # it is there already
    prep = ("nano3", "data", "prep", "kto", "data.sources=[{path: kto.jsonl, split: train}]", "data.tokenizer=tiny")
    assert "2 rows read; 2 written" in nemotron(tmp_path, *prep)
