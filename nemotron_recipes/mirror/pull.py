"""An artifact that exists only in W&B as an input: pinned while planning, downloaded once, checked, kept in the store.

    python -m nemotron_recipes.mirror.pull describe ENTITY/PROJECT/NAME:VERSION
    python -m nemotron_recipes.mirror.pull download ENTITY/PROJECT/NAME:vN FOLDER

wandb is imported in such a process alone. It prints one JSON object: {version, digest, type}, or {error}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.errors import JobFailed, Problem, UserError, printable
from nemotron_recipes.fsio import tree_digest
from nemotron_recipes.mirror.lease import Lease
from nemotron_recipes.mirror.scratch import scratch
from nemotron_recipes.redact import scrub, secret_values
from nemotron_recipes.spec import Artifact, Producer, Tree

REFERENCE = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+:[\w.-]+")
OTHER = {"data": "model", "model": "dataset"}  # kind here -> a type in W&B that it can't be
DESCRIBE_SECONDS = 60.0
DOWNLOAD_SECONDS = 24 * 3600.0
POLL_SECONDS = 1.0


def describe(reference: str, kind: str) -> Artifact:
    """`ENTITY/PROJECT/NAME:VERSION or :ALIAS`, pinned to W&B's version and digest. UserError: W&B doesn't have it."""
    if not REFERENCE.fullmatch(reference):
        raise UserError(Problem(f"'wandb:{reference}' is not wandb:ENTITY/PROJECT/NAME:VERSION"))
    said = _ask(["describe", reference], DESCRIBE_SECONDS)
    if "error" in said:
        fix = "is WANDB_API_KEY set, and the name right? Or plan with --offline, which pins nothing"
        raise UserError(Problem(f"wandb:{reference}: {said['error']}", fix=fix))
    if said["type"] == OTHER.get(kind):
        raise UserError(Problem(f"wandb:{reference} is a {said['type']} in W&B, and a {kind} is wanted here"))
    name = reference.partition(":")[0]
    return Artifact("wandb", kind, name, revision=said["version"], digest=said["digest"])


def ensure(store: Store, artifact: Artifact, download: bool) -> Artifact:
    """The version in the store that holds a W&B artifact; brought there first where it is missing.

    download: this process fetches it; others wait until it is there. UserError: W&B has other content than planned.
    """
    producer = Producer(artifact.identity, "wandb", "download", artifact.kind)
    until = time.monotonic() + DOWNLOAD_SECONDS
    while (found := store.find_output(producer)) is None:
        if download:
            return _fetch_alone(store, artifact, producer)
        if time.monotonic() > until:
            raise JobFailed(f"{artifact.label} was not brought into the store by rank 0")
        time.sleep(POLL_SECONDS)
    return found


def _fetch_alone(store: Store, artifact: Artifact, producer: Producer) -> Artifact:
    """Of several runs that want it at a time one fetches it, and the others take what it has brought."""
    place = store.root / ".incoming" / hashlib.sha256(artifact.identity.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    lease = Lease(place)
    if not lease.take(DOWNLOAD_SECONDS):
        raise JobFailed(f"{artifact.label} was not brought into the store by another run: {place}")
    lease.keep(lambda: None)  # taken over, it is there twice, which harms nobody
    try:
        return store.find_output(producer) or _fetch(store, artifact, producer)
    finally:
        lease.release()


def _fetch(store: Store, artifact: Artifact, producer: Producer) -> Artifact:
    path = f"{artifact.name}:{artifact.revision}"
    staged = store.stage(re.sub(r"[^A-Za-z0-9._-]", "-", artifact.name.rpartition("/")[2]))
    try:
        said = _ask(["download", path, str(staged.content)], DOWNLOAD_SECONDS)
        if "error" in said:
            raise UserError(Problem(f"{artifact.label}: {said['error']}", fix="is WANDB_API_KEY set here?"))
        if said["digest"] != artifact.digest:
            what = f"{artifact.label} isn't what was planned: its digest is {said['digest']}, planned {artifact.digest}"
            raise UserError(Problem(what, fix="plan again"))
        recorded = said["recorded"]
        if recorded and recorded != tree_digest(staged.content):
            raise UserError(Problem(f"{artifact.label}: the files are not those that were mirrored ({recorded})"))
        metadata = {"wandb": path, "wandb_digest": said["digest"]}
        return store.commit(staged, kind=artifact.kind, producer=producer, metadata=metadata)
    except BaseException:
        store.discard(staged)
        raise


def _ask(arguments: list[str], seconds: float) -> Tree:
    """What a process of this module says."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nemotron_recipes.mirror.pull", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"W&B did not answer for {seconds:.0f} s"}
    lines = done.stdout.splitlines()
    if not lines:
        return {"error": scrub(done.stderr[-500:], secret_values(os.environ)) or "no answer"}
    return json.loads(lines[-1])


def main(argv: list[str] | None = None) -> int:
    order, path, *folder = sys.argv[1:] if argv is None else argv
    with scratch() as own:
        places = dict.fromkeys(("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), own)
        os.environ.update(places, WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")
        try:
            import wandb
            from wandb.errors import Error as WandbError
        except ModuleNotFoundError:
            print(json.dumps({"error": "the package 'wandb' isn't installed: pip install 'nemotron-recipes[wandb]'"}))
            return 1
        try:
            found = wandb.Api(timeout=30).artifact(path)
            if order == "download":
                _download(found, Path(folder[0]))
        except (WandbError, ValueError, OSError) as error:
            text = scrub(str(error), secret_values(os.environ)).strip().splitlines() or [type(error).__name__]
            print(json.dumps({"error": printable(text[0])}))
            return 1
    recorded = found.metadata.get("digest") if found.metadata.get("label") else None
    print(json.dumps({"version": found.version, "digest": found.digest, "type": found.type, "recorded": recorded}))
    return 0


def _download(found: Any, folder: Path) -> None:
    """All files, each with the digest that W&B recorded. ValueError: a name leads out of the folder."""
    for name in found.manifest.entries:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"it holds a file named {name!r}, which leads out of its folder")
    found.download(root=str(folder), skip_cache=True)  # the cache is a second copy, of a model that may not fit there
    found.verify(root=str(folder))


if __name__ == "__main__":
    sys.exit(main())
