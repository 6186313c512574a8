"""What W&B answers to the GraphQL calls of the SDK, of what FakeWandb (fake_wandb.py) keeps."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any

Tree = dict[str, Any]


@dataclass
class Run:
    project: str
    name: str
    history: dict[int, Tree] = field(default_factory=dict)
    summary: Tree = field(default_factory=dict)
    config: Tree = field(default_factory=dict)
    group: str | None = None
    job_type: str | None = None
    display: str | None = None
    exit_code: int | None = None
    complete: bool = False
    used: list[str] = field(default_factory=list)  # artifact ids
    made: list[str] = field(default_factory=list)


@dataclass
class Artifact:
    id: str
    project: str
    collection: str
    type: str
    digest: str
    number: int
    metadata: str = "{}"
    aliases: list[str] = field(default_factory=list)
    state: str = "PENDING"
    manifest: str = ""


class Answers:
    """Each operation by its name; it returns `data`."""

    url: str
    lock: threading.RLock
    runs: dict[str, Run]
    artifacts: dict[str, Artifact]
    blobs: dict[str, bytes]
    unknown: list[str]

    def answer(self, operation: str, query: str, values: Tree) -> Tree:
        method = getattr(self, f"_{operation}", None)
        if method is None:
            self.unknown.append(f"{operation}: {query} {values}")
            return {}
        with self.lock:
            try:
                return method(values)
            except (KeyError, TypeError) as error:
                self.unknown.append(f"{operation}: {error!r} in {values}")
                return {}

    def _RunResumeStatus(self, v: Tree) -> Tree:
        run = self.runs.get(v["name"])
        bucket = None
        if run is not None:
            tail = [json.dumps(run.history[n]) for n in sorted(run.history)[-1:]]
            bucket = {
                "id": _id("run", run.name),
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.display,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": {}}),
            }
        entity = {"id": _id("entity", v["entity"]), "name": v["entity"]}
        return {"model": {"id": _id("project", v["project"]), "name": v["project"], "entity": entity, "bucket": bucket}}

    def _UpsertBucket(self, v: Tree) -> Tree:
        name = v["name"] or _unid(v["id"])
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(v["project"], name))
        run.config.update(json.loads(v["config"] or "{}"))
        run.group, run.job_type = v["groupName"] or run.group, v["jobType"] or run.job_type
        run.display = v["displayName"] or run.display
        entity = {"id": _id("entity", v["entity"]), "name": v["entity"]}
        bucket = {
            "id": _id("run", name),
            "name": name,
            "displayName": run.display or name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": _id("project", v["project"]), "name": v["project"], "entity": entity},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, v: Tree) -> Tree:
        files = [{"name": f, "uploadUrl": f"{self.url}/blob/{v['run']}/{f}"} for f in v["files"]]
        return {"createRunFiles": {"runID": _id("run", v["run"]), "uploadHeaders": [], "files": files}}

    def _Viewer(self, v: Tree) -> Tree:
        teams = {"edges": [{"node": {"name": "team"}}]}
        return {"viewer": {"id": "u", "entity": "team", "username": "u", "email": "", "flags": "{}", "teams": teams}}

    _GetDefaultEntity = _Viewer

    def _Run(self, v: Tree) -> Tree:
        run = self.runs.get(v["name"])
        if run is None:
            return {"project": {"run": None}}
        plain = ("commit", "description", "notes", "sweepName", "heartbeatAt")
        fields: Tree = dict.fromkeys(plain)
        fields |= {
            "tags": [],
            "systemMetrics": "{}",
            "user": {"name": "u", "username": "u"},
            "id": _id("run", run.name),
            "projectId": "1",
            "name": run.name,
            "displayName": run.display,
        }
        fields |= {"state": "finished", "config": json.dumps(run.config), "group": run.group, "jobType": run.job_type}
        fields |= {"readOnly": False, "createdAt": "2026-01-01T00:00:00Z", "summaryMetrics": json.dumps(run.summary)}
        fields |= {"historyLineCount": len(run.history), **self._RunHistoryKeys(v)["project"]["run"]}
        return {"project": {"run": fields}}

    def _RunHistoryKeys(self, v: Tree) -> Tree:
        steps = [row["_step"] for row in self.runs[v["name"]].history.values()]
        return {"project": {"run": {"historyKeys": {"lastStep": max(steps, default=-1)}}}}

    def _ServerFeaturesQuery(self, v: Tree) -> Tree:
        return {"serverInfo": {"features": []}}

    def _CreateArtifact(self, v: Tree) -> Tree:
        i = v["input"]
        same = [
            a
            for a in self.artifacts.values()
            if (a.project, a.collection, a.digest) == (i["projectName"], i["artifactCollectionName"], i["digest"])
        ]
        versions = [a for a in self.artifacts.values() if a.collection == i["artifactCollectionName"]]
        if same:
            artifact = same[0]
        else:
            number = len(versions)
            artifact = Artifact(
                _id("artifact", f"{i['artifactCollectionName']}-{number}"),
                *(i["projectName"], i["artifactCollectionName"], i["artifactTypeName"], i["digest"], number),
                metadata=i["metadata"] or "{}",
            )
            self.artifacts[artifact.id] = artifact
        for alias in i["aliases"] or []:
            self._move_alias(artifact, alias["alias"])
        run = self.runs.get(i["runName"] or "")
        if run is not None and artifact.id not in run.made:
            run.made.append(artifact.id)
        latest = {"id": versions[-1].id} if versions else None
        made = {"id": artifact.id, "state": artifact.state, "artifactSequence": {"latestArtifact": latest}}
        return {"createArtifact": {"artifact": made}}

    def _CreateArtifactManifest(self, v: Tree) -> Tree:
        url = f"{self.url}/blob/manifest/{v['artifactID']}/{hashlib.md5(v['digest'].encode()).hexdigest()}"
        if v["digest"]:
            self.artifacts[v["artifactID"]].manifest = url
        file = {"id": _id("file", url), "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": _id("manifest", v["artifactID"]), "file": file}}}

    def _UpdateArtifactManifest(self, v: Tree) -> Tree:
        artifact = _unid(v["artifactManifestID"])
        url = f"{self.url}/blob/manifest/{artifact}/final"
        self.artifacts[artifact].manifest = url
        file = {"id": _id("file", url), "uploadUrl": url, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": v["artifactManifestID"], "file": file}}}

    def _CommitArtifact(self, v: Tree) -> Tree:
        artifact = self.artifacts[v["artifactID"]]
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _CreateArtifactFiles(self, v: Tree) -> Tree:
        edges = []
        for spec in v["input"]["artifactFiles"]:
            url = f"{self.url}/blob/file/{base64.b64decode(spec['md5']).hex()}"
            node = {"id": _id("file", url), "name": spec["name"], "displayName": spec["name"], "uploadUrl": url}
            node |= {"uploadHeaders": [], "storagePath": f"file/{spec['md5']}", "artifact": {"id": spec["artifactID"]}}
            edges.append({"node": {**node, "uploadMultipartUrls": None}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _UseArtifact(self, v: Tree) -> Tree:
        i = v.get("input", v)
        run, artifact = self.runs[i["runName"]], self.artifacts[i["artifactID"]]
        if artifact.id not in run.used:
            run.used.append(artifact.id)
        return {"useArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest, "description": None}}}

    def _ArtifactType(self, v: Tree) -> Tree:
        found = self._find(v["project"], v["name"])
        return {"project": {"artifact": {"artifactType": {"name": found.type}} if found else None}}

    def _ArtifactMembershipByName(self, v: Tree) -> Tree:
        found = self._find(v["project"], v["name"])
        return {"project": {"artifactCollectionMembership": self._membership(found, v) if found else None}}

    def _ArtifactByID(self, v: Tree) -> Tree:
        return {"artifact": self._fragment(self.artifacts[v["id"]])}

    def _FetchArtifactManifest(self, v: Tree) -> Tree:
        return {"artifact": {"currentManifest": {"file": {"directUrl": self.artifacts[v["id"]].manifest}}}}

    def _GetArtifactMembershipFileUrls(self, v: Tree) -> Tree:
        found = self._find(v["project"], f"{v['collection']}:{v['alias']}")
        assert found is not None
        manifest = json.loads(self.blobs[found.manifest.removeprefix(self.url)])
        edges = [
            {"node": {"__typename": "File", "name": name, "directUrl": f"{self.url}/blob/file/{_hex(entry['digest'])}"}}
            for name, entry in manifest["contents"].items()
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        files = {"pageInfo": page, "edges": edges}
        return {
            "project": {
                "artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
            }
        }

    def _UpdateArtifact(self, v: Tree) -> Tree:
        artifact = self.artifacts[v["input"]["artifactID"]]
        if v["input"].get("metadata") is not None:
            artifact.metadata = v["input"]["metadata"]
        return {"result": {"artifact": self._fragment(artifact)}}

    def _AddAliases(self, v: Tree) -> Tree:
        for alias in v["input"]["aliases"]:
            self._move_alias(self.artifacts[v["input"]["artifactID"]], alias["alias"])
        return {"result": {"success": True}}

    def _DeleteAliases(self, v: Tree) -> Tree:
        artifact = self.artifacts[v["input"]["artifactID"]]
        gone = [alias["alias"] for alias in v["input"]["aliases"]]
        artifact.aliases = [alias for alias in artifact.aliases if alias not in gone]
        return {"result": {"success": True}}

    def _find(self, project: str, name: str) -> Artifact | None:
        collection, _, wanted = name.partition(":")
        return next(
            (
                a
                for a in self.artifacts.values()
                if (a.project, a.collection, a.state) == (project, collection, "COMMITTED")
                and (wanted in a.aliases or wanted == f"v{a.number}")
            ),
            None,
        )

    def _collection(self, a: Artifact) -> Tree:
        project = {"id": _id("project", a.project), "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==", "name": a.project}
        return {
            "__typename": "ArtifactSequence",
            "name": a.collection,
            "project": {**project, "entity": {"name": "team"}},
        }

    def _aliases(self, a: Artifact) -> list[Tree]:
        return [{"__typename": "ArtifactAlias", "id": _id("alias", alias), "alias": alias} for alias in a.aliases]

    def _membership(self, a: Artifact, v: Tree) -> Tree:
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": _id("membership", a.id),
            "versionIndex": a.number,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": self._aliases(a),
            "artifactCollection": self._collection(a),
            "artifact": self._fragment(a),
        }

    def _fragment(self, a: Artifact) -> Tree:
        return {
            "__typename": "Artifact",
            "id": a.id,
            "artifactSequence": self._collection(a),
            "versionIndex": a.number,
            "artifactType": {"name": a.type},
            "description": None,
            "metadata": a.metadata,
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": a.state,
            "size": "1",
            "digest": a.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": a.digest,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [{**alias, "artifactCollection": self._collection(a)} for alias in self._aliases(a)],
        }

    def _move_alias(self, artifact: Artifact, alias: str) -> None:
        for other in self.artifacts.values():
            if other.collection == artifact.collection and alias in other.aliases:
                other.aliases.remove(alias)
        artifact.aliases.append(alias)


def _id(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def _unid(text: str) -> str:
    return base64.b64decode(text).decode().partition(":")[2]


def _hex(digest: str) -> str:
    return base64.b64decode(digest).hex()
