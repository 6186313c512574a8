"""The artifact store: numbered, immutable versions in plain folders, safe without locks.

    <root>/<name>/v3/artifact.json         the manifest
    <root>/<name>/v3/files.json            which files the data are, with their digests (contents.py)
    <root>/<name>/v3/content/...           the data; `digest` in the manifest covers just this folder
    <root>/<name>/.aliases/<alias>         text "v3"
    <root>/.index/<key>/<name>@v3          empty; key = digest of "fingerprint/slot"
    <root>/.staging/                       unfinished outputs (staging.py)

A version comes to be by one rename of a finished, fsynced folder. Renaming a folder onto one that isn't empty fails on
every file system, so two processes never get the same number; the loser takes the next one. The index entry is written
before that rename: an entry may name a version that never came (readers check), but no version lacks its entry.
Standard library only; importing this costs next to nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from nemotron_recipes.artifacts import aliases, contents, staging
from nemotron_recipes.artifacts.staging import Staged
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.fsio import digest_of, digests_below, fsync_folder, fsync_tree, write_atomic
from nemotron_recipes.rundir import Damaged, read_json
from nemotron_recipes.seals import SEAL, digest
from nemotron_recipes.spec import Artifact, Producer, Tree, sha256_text

LATEST = "latest"
KEYS = frozenset(
    ("name", "kind", "version", "digest", "size", "files", "created", "producer", "parents", "metadata", "results")
)
STALE_SECONDS = 65.0  # a little more than NFS clients keep what they know of a folder (acdirmax)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"v([1-9][0-9]*)")


class Store:
    """One store folder; it need not exist before the first `stage`.

    named  what the folder is called where its data lie; another one than `root` where that holds the manifests alone
    """

    def __init__(self, root: Path, named: str | None = None):
        self.root, self.named = Path(root), named or str(root)

    def resolve(self, ref: str) -> Artifact:
        """The version that `NAME`, `NAME:vN` or `NAME:ALIAS` means now. Raises UserError when there is none."""
        name, colon, selector = ref.partition(":")
        check_name(name)
        versions = self.versions(name)
        if not versions:
            fix = nearest(name, self.names()) or "nothing is registered there yet: run what makes it, or give a path"
            raise UserError(Problem(f"no artifact '{name}' in the store", self.named, fix))
        if not colon or selector == LATEST:
            return self._artifact(name, versions[-1])
        number = _VERSION.fullmatch(selector)
        version = int(number[1]) if number else self.aliases(name).get(selector)
        if version is None or version not in versions:
            valid = [LATEST, *self.aliases(name), *(f"v{v}" for v in versions)]
            raise UserError(Problem(f"artifact '{name}' has no '{selector}'", self.named, nearest(selector, valid)))
        return self._artifact(name, version)

    def names(self) -> list[str]:
        """Every name that has a whole version."""
        return [name for name in _listdir(self.root) if _NAME.fullmatch(name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Numbers of the whole versions, oldest first."""
        return [n for n in self._numbers(name) if os.path.isfile(self._manifest_path(name, n))]

    def newest(self) -> Iterator[tuple[Artifact, Tree]]:
        """Of every name: (its newest version, that one's manifest). No other file is looked at."""
        for name in _listdir(self.root):
            for version in reversed(self._numbers(name)) if _NAME.fullmatch(name) else ():
                if (manifest := self._manifest(name, version)) is not None:
                    yield self._of(name, version, manifest), manifest
                    break

    def aliases(self, name: str) -> dict[str, int]:
        """The user's aliases of a name and the versions that they mean."""
        folder = self.root / name / ".aliases"
        return {alias: aliases.read(folder.parent, alias) for alias in _listdir(folder) if _NAME.fullmatch(alias)}

    def describe(self, artifact: Artifact) -> Tree:
        """The manifest of a registered version."""
        manifest = self._manifest(artifact.name, artifact.version or 0)
        if manifest is None:
            raise UserError(Problem(f"{artifact.label} isn't in the store", self.named, "make it again"))
        return manifest

    def verify(self, artifact: Artifact) -> None:
        """Read all its data and raise UserError, naming the file, unless the digest is the recorded one."""
        recorded = self.describe(artifact)["digest"]
        content = self.content(artifact)
        if found := [*contents.problems(artifact.label, content, recorded, artifact.digest or recorded)]:
            raise UserError(*found)

    def content(self, artifact: Artifact) -> Path:
        """The folder with the data of a registered version."""
        return Path(self._manifest_path(artifact.name, artifact.version or 0)).parent / "content"

    def find(self, fingerprint: str, slot: str, name: str) -> Artifact | None:
        """The newest whole version of `name` that a stage with this fingerprint made as this output."""
        return next((a for a in self._made_by(fingerprint, slot) if a.name == name), None)

    def find_output(self, producer: Producer) -> Artifact | None:
        """The newest whole version that just this run and stage made as this output."""
        return next((a for a in self._made_by(producer.fingerprint, producer.slot) if a.producer == producer), None)

    def stage(self, name: str) -> Staged:
        """A private folder for a coming version of `name`; also removes what crashed processes left behind."""
        check_name(name)
        staged = staging.create(self.root, name)
        staging.clean(self.root, now=staged.content.stat().st_mtime)
        return staged

    def commit(
        self,
        staged: Staged,
        *,
        kind: str,
        producer: Producer | None = None,
        attempt: int = 1,
        parents: Mapping[str, Artifact] | None = None,
        metadata: Tree | None = None,
        results: Mapping[str, float | None] | None = None,
        config: Tree | None = None,
    ) -> Artifact:
        """Register the staged content as the next version; when this returns, it is durable and will never change.

        parents: config key -> the exact input; config: the settings that made it. A crash at any moment leaves the
        version whole or absent. Raises UserError for content that can't be owned (links, nothing at all).
        """
        files = staging.own_files(staged.content)
        if not files:
            raise UserError(Problem(f"the output '{staged.name}' is empty", str(staged.content)))
        digests = digests_below(staged.content, files)
        manifest: Tree = {
            "name": staged.name,
            "kind": kind,
            "digest": digest_of(digests),
            "size": sum(path.stat().st_size for path in files),
            "files": len(files),
            "created": round(time.time(), 3),
            "producer": {**asdict(producer), "attempt": attempt, "config": config} if producer else None,
            "parents": [{"input": key, **asdict(parent)} for key, parent in (parents or {}).items()],
            "metadata": metadata or {},
            "results": dict(results or {}),
        }
        contents.write(staged.content, digests)
        fsync_tree(staged.version)
        version = self._publish(staged, manifest, producer)
        with suppress(OSError):  # the version is there; a network file system may keep a file that somebody reads
            (staged.folder / "owner.json").unlink()
            staged.folder.rmdir()
        return self._artifact(staged.name, version)

    def discard(self, staged: Staged) -> None:
        """Remove a staged output that will never be committed; nothing happens when it was."""
        shutil.rmtree(staged.folder, ignore_errors=True)  # what can't be removed now is cleaned by a later `stage`

    def alias(self, name: str, alias: str, version: int) -> None:
        """Let `NAME:ALIAS` mean `version` from now on; readers see the old meaning or the new one."""
        check_name(alias, what="alias")
        if alias == LATEST or _VERSION.fullmatch(alias):
            raise UserError(Problem(f"'{alias}' can't be an alias", fix="'latest' and v1, v2, ... have their meaning"))
        self.resolve(f"{name}:v{version}")
        aliases.write(self.root / name, alias, version)

    def unalias(self, name: str, alias: str) -> None:
        """`NAME:ALIAS` means nothing from now on. UserError: it never did."""
        check_name(name)
        known = _listdir(self.root / name / ".aliases")
        if alias not in known:
            fix = nearest(alias, known) or (f"it has: {', '.join(known)}" if known else "")
            raise UserError(Problem(f"'{name}' has no alias '{alias}'", self.named, fix))
        aliases.remove(self.root / name, alias)

    def rebuild_index(self) -> int:
        """Write the index entries of every version anew (a store that was copied without its index); their number."""
        found = [self._artifact(name, version) for name in self.names() for version in self.versions(name)]
        made = [artifact for artifact in found if artifact.producer is not None]
        for artifact in made:
            self._index(artifact.identity, artifact.name, artifact.version or 0)
        return len(made)

    def _publish(self, staged: Staged, manifest: Tree, producer: Producer | None) -> int:
        """Claim the next number by renaming the staged folder there; durable when this returns."""
        home = self.root / staged.name
        home.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.root)
        version = 0
        while True:
            version = max([version, *self._numbers(staged.name)]) + 1
            numbered = {**manifest, "version": version}
            text = json.dumps({**numbered, SEAL: digest(numbered)}, indent=2, sort_keys=True)
            write_atomic(staged.version / "artifact.json", text)
            if producer:
                self._index(f"{producer.fingerprint}/{producer.slot}", staged.name, version)
            try:
                os.rename(staged.version, home / f"v{version}")
            except OSError as error:
                if not _is_taken(error, home / f"v{version}"):
                    raise
                continue  # another process took this number, perhaps with the same fingerprint: the entry stays
            fsync_folder(home)
            fsync_folder(staged.folder)
            return version

    def _index(self, identity: str, name: str, version: int) -> None:
        entry = self.root / ".index" / sha256_text(identity).removeprefix("sha256:") / f"{name}@v{version}"
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.touch()
        for folder in (entry.parent, entry.parent.parent, self.root):
            fsync_folder(folder)

    def _made_by(self, fingerprint: str, slot: str) -> list[Artifact]:
        """What the index has for this output, newest version first; entries without a matching version left out."""
        folder = self.root / ".index" / sha256_text(f"{fingerprint}/{slot}").removeprefix("sha256:")
        found = []
        for entry in _listdir(folder):
            name, _, number = entry.rpartition("@v")
            if not number.isdigit() or not os.path.isfile(self._manifest_path(name, int(number))):
                continue
            artifact = self._artifact(name, int(number))
            if artifact.producer and (artifact.producer.fingerprint, artifact.producer.slot) == (fingerprint, slot):
                found.append(artifact)
        return sorted(found, key=lambda artifact: artifact.version or 0, reverse=True)

    def _artifact(self, name: str, version: int) -> Artifact:
        manifest = self._manifest(name, version)
        assert manifest is not None, "callers have seen the manifest"
        return self._of(name, version, manifest)

    def _of(self, name: str, version: int, manifest: Tree) -> Artifact:
        made = manifest["producer"]
        return Artifact(
            source="store",
            kind=manifest["kind"],
            name=name,
            version=version,
            uri=f"{self.named}/{name}/v{version}/content",
            digest=manifest["digest"],
            producer=Producer(made["fingerprint"], made["run"], made["stage"], made["slot"]) if made else None,
        )

    def _manifest(self, name: str, version: int) -> Tree | None:
        path = self._manifest_path(name, version)
        try:
            manifest = read_json(path)
        except Damaged as error:
            reason = error.reason
        else:
            if manifest is None or manifest.keys() == KEYS:
                return manifest
            reason = "it says neither what it is nor who made it"
        fix = f"restore the file, or remove the folder {os.path.dirname(path)}"
        raise UserError(Problem(f"the manifest of {name}:v{version} is damaged: {reason}", path, fix))

    def _numbers(self, name: str) -> list[int]:
        entries = _entries(f"{self.root}/{name}")
        return sorted(int(found[1]) for entry in entries if (found := _VERSION.fullmatch(entry)))

    def _manifest_path(self, name: str, version: int) -> str:
        return f"{self.root}/{name}/v{version}/artifact.json"


def check_name(name: str, what: str = "artifact name") -> None:
    """Raise UserError unless `name` may be a folder of the store."""
    problems = name_problems(name, what)
    if problems:
        raise UserError(*problems)


def name_problems(name: str, what: str = "artifact name") -> list[Problem]:
    """Why `name` can't be a folder of the store; empty when it can."""
    if _NAME.fullmatch(name):
        return []
    fix = "use letters, digits, '.', '_' and '-', a letter or digit first, at most 128 of them"
    return [Problem(f"'{name}' can't be an {what}", fix=fix)]


def _is_taken(error: OSError, version: Path) -> bool:
    """Whether a rename was refused because that version is there. sshfs says EPERM whatever the reason, and like other
    network file systems it may deny for a while what another machine has made."""
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return True
    until = time.monotonic() + STALE_SECONDS
    while error.errno == errno.EPERM and time.monotonic() < until:
        if version.name in _listdir(version.parent):
            return True
        time.sleep(STALE_SECONDS / 200)
    return False


def _listdir(folder: Path) -> list[str]:
    """Sorted names, read from the folder itself (a network file system may deny a new file until it is listed)."""
    return sorted(_entries(folder))


def _entries(folder: str | Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
