"""The W&B name, alias and type of everything that a stage reads or makes. Pure.

W&B counts versions itself, from v0 on. A version of ours is found there by an alias that nobody else gives:
`nano3-tiny-sft.v3.1a2b3c4d`. Its end stands for the content and the run that made it: several stores may share a W&B
project.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from nemotron_recipes.mirror.journal import Target
from nemotron_recipes.spec import Artifact

TYPES = {"data": "dataset", "model": "model"}
LONGEST = 128  # characters of a W&B name or alias


@dataclass(frozen=True)
class Named:
    """collection:alias, and where the content really lies."""

    collection: str
    alias: str
    type: str
    uri: str

    @property
    def path(self) -> str:
        return f"{self.collection}:{self.alias}"


def named(target: Target, artifact: Artifact, stage: str = "") -> Named:
    """`stage`: of the producer, where the artifact doesn't say."""
    kind = TYPES.get(artifact.kind, artifact.kind)
    if artifact.source == "store":
        made_in = artifact.producer.stage if artifact.producer else stage or artifact.name
        template = target.data_name if artifact.kind == "data" else target.model_name
        fields = {"stage": made_in.rpartition("-")[2], "name": artifact.name}
        made_by = artifact.producer.run if artifact.producer else ""
        mark = hashlib.sha256(f"{artifact.digest} {made_by}".encode()).hexdigest()[:8]
        alias = _safe(f"{artifact.name}.v{artifact.version}.{mark}")
        return Named(_safe(template.format(**fields)), alias, kind, artifact.uri)
    if artifact.source == "hub":
        uri = f"https://huggingface.co/{'datasets/' if artifact.kind == 'data' else ''}{artifact.name}"
        revision = artifact.revision or "unpinned"
        return Named(_safe(f"hf-{artifact.name}"), revision[:12], kind, f"{uri}/tree/{revision}")
    if artifact.source == "builtin":
        return Named(_safe(f"builtin-{artifact.kind}-{artifact.name}"), "builtin", kind, f"nemotron://{artifact.name}")
    digest = artifact.digest.removeprefix("sha256:")[:12] or "unread"
    return Named(_safe(f"path-{artifact.uri.rstrip('/').rpartition('/')[2]}"), digest, kind, f"path://{artifact.uri}")


def _safe(name: str) -> str:
    """Letters that W&B takes; a name that is too long keeps its start and gets a digest."""
    text = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
