"""Tables, pictures, sound, film and pages that a trainer logged to W&B offline, made anew from their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.spec import Tree

SEVERAL = {"images/separated": "image-file"}
KINDS = ("table-file", "image-file", "audio-file", "video-file", "html-file", *SEVERAL)


@dataclass(frozen=True)
class Media:
    """What a row says of it, and the folder in which its path lies."""

    said: Tree
    folder: Path

    @classmethod
    def of(cls, value: Any, folder: Path) -> Media | None:
        """None: the value stands in the row itself, as numbers, texts and histograms do."""
        if not isinstance(value, dict) or "_type" not in value or not {"path", "filenames"} & value.keys():
            return None
        return cls(value, folder)

    def again(self, wandb: Any) -> Any:
        """The same as an object of the SDK, to be logged; None: a kind that can't be made from its file.

        ValueError, OSError: the file is gone or damaged.
        """
        kind = self.said["_type"]
        if kind in SEVERAL:
            names, captions = self.said["filenames"], self.said.get("captions") or []
            told = [captions[n] if n < len(captions) else None for n in range(len(names))]
            return [self._one(wandb, SEVERAL[kind], name, caption) for name, caption in zip(names, told, strict=True)]
        return self._one(wandb, kind, self.said["path"], self.said.get("caption")) if kind in KINDS else None

    def _one(self, wandb: Any, kind: str, name: str, caption: str | None) -> Any:
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name} leads out of {self.folder}")
        if kind == "table-file":
            table = json.loads(path.read_bytes())
            return wandb.Table(columns=table["columns"], data=table["data"], allow_mixed_types=True)
        if kind == "image-file":
            return wandb.Image(str(path), caption=caption)
        if kind == "audio-file":
            return wandb.Audio(str(path), caption=caption)
        if kind == "video-file":
            return wandb.Video(str(path), caption=caption)
        return wandb.Html(str(path), inject=False)
