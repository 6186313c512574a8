"""What every executor checks of a stage before it is rendered: secrets, names, and text that no process can receive."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nemotron_recipes.errors import Problem
from nemotron_recipes.redact import SHORTEST, forms, holds_a_password, reads_like_a_secret
from nemotron_recipes.rundir import ATTEMPT_ENV, RUN_ID_ENV
from nemotron_recipes.spec import StagePlan

UNDECLARED = 16  # characters of a value whose variable only reads like a secret; shorter ones would match by chance
_LONGEST_ARGUMENT = 128 * 1024  # bytes; MAX_ARG_STRLEN of Linux, which counts the terminating NUL


def secret_problems(stage: StagePlan) -> Iterator[Problem]:
    """Secrets that are not set here, or whose value stands in what would be written, in whichever form."""
    written = [*stage.launch.files.values(), *stage.launch.args, *stage.launch.env.values()]
    written += [*stage.placement.options.get("env", {}).values(), *_texts(stage.config)]
    if any(map(holds_a_password, written)):
        what, fix = "a URL in the config holds a password", "take it out: plans and run folders are kept in plain text"
        yield Problem(what, where(stage), fix)
    for name in dict.fromkeys([*stage.placement.secrets, *filter(reads_like_a_secret, os.environ)]):
        value = os.environ.get(name)
        if not value and name in stage.placement.secrets:
            yield Problem(
                f"secret {name} is not set", where(stage, "secrets"), f"export {name}=... where you start the run"
            )
        shortest = SHORTEST if name in stage.placement.secrets else UNDECLARED
        told = forms(value) if value and len(value) >= shortest else ()
        if any(form in text for text in written for form in told):
            yield Problem(
                f"the value of secret {name} stands in the config in plain text",
                where(stage, "secrets"),
                f"take it out: the stage inherits {name} from the environment",
            )


def env_problems(stage: StagePlan, reserved: Sequence[str] = ()) -> Iterator[Problem]:
    """Variables of the profile that the executor sets itself (`reserved` adds some), or that can't be."""
    for name in stage.placement.options.get("env", {}):
        if name in (ATTEMPT_ENV, RUN_ID_ENV, *reserved):
            yield Problem(f"{name} is set by the executor itself", where(stage, "env"), "choose another name")
        elif name in stage.placement.secrets:
            yield Problem(
                f"{name} is a secret, but set in plain text", where(stage, "env"), "keep it under secrets only"
            )
        elif reads_like_a_secret(name):
            fix = f"export {name}=... where you start the run, and list the name under secrets"
            yield Problem(f"{name} reads like a secret, and env is kept in plain text", where(stage, "env"), fix)
        elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Problem(
                f"{name!r} is no name for an environment variable", where(stage, "env"), "use letters, digits and _"
            )


def text_problems(stage: StagePlan, argv: Sequence[str]) -> Iterator[Problem]:
    """NUL, text that is not UTF-8, and arguments that the kernel refuses."""
    received = {"the run's folder": stage.directory}
    received |= {f"argument {n}": text for n, text in enumerate(argv)}
    received |= {f"file name {name!r}": name for name in stage.launch.files}
    received |= {f"env {name}": text for name, text in stage.launch.env.items()}
    received |= {f"env {name}": text for name, text in stage.placement.options.get("env", {}).items()}
    for what, text in received.items():
        if "\0" in text:
            yield Problem(f"{what} holds a NUL character", where(stage), "no process can receive it; take it out")
        elif not _is_utf8(text):
            yield Problem(f"{what} is not valid UTF-8: {text!r}", where(stage), "rename it in UTF-8")
        elif len(text.encode()) >= _LONGEST_ARGUMENT:
            yield Problem(f"{what} is longer than {_LONGEST_ARGUMENT} bytes", where(stage), "put it into a file")
    for name, text in stage.launch.files.items():
        if not _is_utf8(text):
            yield Problem(f"the text of {name} is not valid UTF-8", where(stage), "write it in UTF-8")


def _texts(value: Any) -> Iterator[str]:
    """All keys and values of a config that are text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def where(stage: StagePlan, key: str = "") -> str:
    """`stage sft, profile desk, secrets`: which setting a problem is about."""
    place = stage.placement
    profile = f"profile {place.profile}" if place.profile else f"executor {place.executor}"
    return f"stage {stage.name}, {profile}" + (f", {key}" if key else "")


def _is_utf8(text: str) -> bool:
    """False for lone surrogates: how Python shows the bytes of a name that is in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
