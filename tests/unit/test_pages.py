"""The pages: whole by themselves, links that lead somewhere, and nothing in them that acts. In a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.lineage import lineage
from nemotron_recipes.artifacts.records import load_run
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.report.html import lineage_page, run_page
from nemotron_recipes.rundir import RunDir, append_event, write_record
from nemotron_recipes.spec import Artifact, Producer

EVIL = '</title></pre><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>\x1b[2J$x^2$'
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
MANY = {f"metric-{number}": number for number in range(10)}
TINY = Artifact("builtin", "model", "tiny")


def a_lineage(root: Path) -> str:
    store = Store(root / "store")

    def register(name: str, kind: str, stage: str, **parents: Artifact) -> Artifact:
        staged = store.stage(name)
        (staged.content / "x").write_text(name)
        gates = {"gates": {"schema": {EVIL: {"rows": 3, "examples": []}}}, "sources": [1]}
        (staged.content / "metadata.json").write_text(json.dumps(gates))
        made = Producer(f"sha256:{name}", f"run-{EVIL}", stage, kind)
        return store.commit(staged, kind=kind, producer=made, parents=parents, results={EVIL: 0.5})

    raw = Artifact("path", "data", uri=f"/data/{EVIL}.jsonl", digest="sha256:" + "a" * 64)
    rows = register("rows", "data", "data-prep", source=raw)
    return lineage_page(
        lineage(store, register("model", "model", "sft", data=rows, model=Artifact("builtin", "model", "tiny")))
    )


def a_run(root: Path) -> str:
    run = RunDir(root / "run")
    stage = run.stage("sft")
    planned = {
        "name": "sft",
        "reused": None,
        "fingerprint": "f",
        "config": {"optimizer": {"lr": 0.1}, "data": {"path": EVIL}},
        "changed": {"data.path": {"kind": "command line", "source": EVIL}},
        "inputs": {},
        "placement": {"executor": "local"},
    }
    plan = {"id": f"run-{EVIL}", "title": EVIL, "created": "2026-01-01T00:00:00+00:00", "stages": [planned]}
    plan["request"] = {"overrides": [EVIL]}
    run.path.mkdir()
    run.plan.write_text(json.dumps(plan))
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    append_event(run.events, "stage-exited", stage="sft", attempt=1, exit_code=0, seconds=1.0)
    append_event(run.events, "finished", state="succeeded")
    stage.log(1, 0).parent.mkdir(parents=True)
    stage.log(1, 0).write_text(f"first\n{EVIL}\nlast words\n")
    stage.metrics.write_text(
        "".join(json.dumps({"step": n, "loss": None if n == 2 else 1 / n, EVIL: 1.0, **MANY}) + "\n" for n in (1, 2, 3))
    )
    parent = {"input": "data.path", "source": "path", "kind": "data", "uri": EVIL, "digest": "sha256:d"}
    output = {"name": "model", "version": 1, "digest": "sha256:e", "uri": "/x"}
    ended = {"state": "succeeded", "attempt": 1, "exit_code": 0, "started": 1.0, "ended": 2.0}
    write_record(stage, {**ended, "parents": [parent], "outputs": {"model": output}, "results": {EVIL: 1.0}})
    return run_page(load_run(run.path))


@pytest.mark.parametrize("make", [a_lineage, a_run])
def test_a_page_opens_from_a_file_and_nothing_in_it_acts(tmp_path: Path, make) -> None:
    text = make(tmp_path)
    assert "\x1b" not in text and "<script" not in text and not re.search(r"<[^>]*\sonerror", text)
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", text), "nothing is loaded from anywhere"
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    dom = _open(path)
    assert "<svg" in dom and "document.title" in dom  # there, but only as text
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title and html.unescape(title[1]).startswith(("Lineage of model:v1", "Run run-</title>"))
    targets = set(re.findall(r'(?:xlink:)?href="#(a[0-9a-f]{12})"', dom))
    assert targets and all(f'id="{target}"' in dom for target in targets), "every link leads somewhere"
    if make is a_run:
        assert "last words" in dom and "command line" in dom
        assert "3 more metrics" in dom and "metric-9" in dom
        assert "stroke: #c62828" in dom, "a loss that was no number is marked"


def _open(path: Path) -> str:
    """What the browser made of the page, after any script had run."""
    if not BROWSER:
        pytest.skip("no Chromium: `make test-system` installs it")
    profile = path.parent / "profile"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout
