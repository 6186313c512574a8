"""Credentials for image registries, looked for where docker and enroot have them. They are never printed."""

from __future__ import annotations

import base64
import binascii
import json
import netrc
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.spec import Tree

HUB_API, _HUB_KEY = "registry-1.docker.io", "https://index.docker.io/v1/"
_HELPER_SECONDS = 60.0  # it may ask for the password of a keyring
_TOKEN = "<token>"  # what a helper gives for the user of an identity token


@dataclass(frozen=True)
class Credentials:
    """Never shown: `source` says where they were found."""

    user: str
    password: str
    source: str

    def __repr__(self) -> str:
        return f"Credentials({self.source})"


def find_credentials(registry: str, environ: Mapping[str, str] = os.environ) -> Credentials | None:
    """Those of $NGC_API_KEY (nvcr.io), of docker's config.json and its credential helpers, or of enroot's .credentials;
    None: anonymously. registry: "" is Docker Hub. UserError: they are there, and can't be used."""
    if registry == "nvcr.io" and environ.get("NGC_API_KEY"):
        return Credentials("$oauthtoken", environ["NGC_API_KEY"], "$NGC_API_KEY")
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    docker = Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"
    enroot = Path(
        environ.get("ENROOT_CONFIG_PATH") or Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "enroot")
    )
    return _of_docker(docker, registry, environ) or _of_enroot(enroot / ".credentials", registry)


def _of_docker(file: Path, registry: str, environ: Mapping[str, str]) -> Credentials | None:
    """https://docs.docker.com/reference/cli/docker/login/#credential-stores"""
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        names = (registry, f"https://{registry}", f"https://{registry}/v1/") if registry else (_HUB_KEY,)
        helpers = tree.get("credHelpers") or {}
        helper = next((helpers[name] for name in names if name in helpers), None) or tree.get("credsStore")
        entries = tree.get("auths") or {}
        entry: Tree = next((entries[name] for name in names if entries.get(name)), {})
        if helper:
            return _of_helper(helper, names[0], file, environ)
        if entry.get("identitytoken"):
            raise _unusable(f"{file} holds an identity token for {registry or 'docker.io'}")
        if not entry.get("auth"):
            return None
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
    except (ValueError, AttributeError, TypeError, binascii.Error, OSError) as error:
        what = f"{file} can't be read: {type(error).__name__}"  # its text may hold a password
        raise UserError(Problem(what, fix="docker login writes it anew")) from None
    return Credentials(user, password, str(file))


def _of_helper(name: str, server: str, file: Path, environ: Mapping[str, str]) -> Credentials | None:
    """What `docker-credential-NAME get` says (https://github.com/docker/docker-credential-helpers)."""
    program = f"docker-credential-{name}"
    try:
        done = subprocess.run(
            (program, "get"),
            input=server,
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=_HELPER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = "does not answer" if isinstance(error, subprocess.TimeoutExpired) else f"can't be run: {error.strerror}"
        what = f"{file} names the credential helper {program}, which {why}"
        raise UserError(Problem(what, fix=f"install it, or take it out of {file} and docker login")) from None
    if done.returncode:
        if "credentials not found" in done.stdout + done.stderr:
            return None
        raise UserError(Problem(f"the credential helper {program} ended with {done.returncode}", str(file), "try it"))
    try:
        told: Tree = json.loads(done.stdout)
        user, password = str(told["Username"]), str(told["Secret"])
    except (ValueError, KeyError, TypeError):
        what = f"the credential helper {program} does not answer as such a helper should"
        raise UserError(Problem(what, str(file))) from None
    if user == _TOKEN:
        raise _unusable(f"the credential helper {program} has an identity token for {server}")
    return Credentials(user, password, f"{program} ({file})")


def _of_enroot(file: Path, registry: str) -> Credentials | None:
    """https://github.com/NVIDIA/enroot/blob/master/doc/cmd/import.md"""
    if not file.is_file():
        return None
    try:
        found = netrc.netrc(str(file)).authenticators(registry.partition(":")[0] or HUB_API)
        found = found or netrc.netrc(str(file)).authenticators(registry)
    except netrc.NetrcParseError as error:
        what = f"{file} can't be read: line {error.lineno} is not of netrc's form"
        raise UserError(Problem(what, fix="machine REGISTRY login USER password KEY")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(f"{file} can't be read: {type(error).__name__}")) from None
    if not found:
        return None
    if (found[2] or "").startswith("$("):
        what = f"{file} has a command for the password of {registry or HUB_API}, which is not run here"
        raise UserError(Problem(what, fix="docker login, or write the password there"))
    return Credentials(found[0], os.path.expandvars(found[2] or ""), str(file))


def _unusable(what: str) -> UserError:
    return UserError(Problem(f"{what}, which is not used here", fix="docker login with a user and a password or key"))
