"""What a registry says of an image: its digest now, and for which architectures it is. The protocol is OCI's
distribution specification (https://github.com/opencontainers/distribution-spec), read with the standard library.

Credentials are looked for where docker and enroot have them, and are never printed: not in an error either.
"""

from __future__ import annotations

import base64
import hashlib
import json
import netrc
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.enroot import Reference

_SECONDS = 30.0
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_HUB_API, _HUB_KEY = "registry-1.docker.io", "https://index.docker.io/v1/"


@dataclass(frozen=True)
class Found:
    """digest: of the manifest or index that the tag names now."""

    digest: str
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Credentials:
    """Never shown: `source` says where they were found."""

    user: str
    password: str
    source: str

    def __repr__(self) -> str:
        return f"Credentials({self.source})"


def look_up(image: Reference, environ: Mapping[str, str] = os.environ) -> Found:
    """Ask the image's registry. UserError: it does not answer, has no such image, or does not let us see it."""
    client = _Client(image, find_credentials(image.registry, environ))
    body, kind, told = client.get(f"manifests/{image.digest or image.tag or 'latest'}", (*_INDEXES, *_MANIFESTS))
    digest = told or f"sha256:{hashlib.sha256(body).hexdigest()}"
    manifest = json.loads(body)
    if kind in _INDEXES:
        platforms = [entry.get("platform", {}) for entry in manifest["manifests"]]
        known = {p["architecture"] for p in platforms if p.get("architecture") not in (None, "unknown")}
        return Found(digest, tuple(sorted(known)))
    config, _, _ = client.get(f"blobs/{manifest['config']['digest']}", ("*/*",))
    return Found(digest, (str(json.loads(config).get("architecture", "unknown")),))


def find_credentials(registry: str, environ: Mapping[str, str] = os.environ) -> Credentials | None:
    """Those of $NGC_API_KEY (nvcr.io), of docker's config.json, or of enroot's .credentials; None: anonymously."""
    if registry == "nvcr.io" and environ.get("NGC_API_KEY"):
        return Credentials("$oauthtoken", environ["NGC_API_KEY"], "$NGC_API_KEY")
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    docker = Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"
    auths: dict[str, Any] = {}
    if docker.is_file():
        auths = json.loads(docker.read_text()).get("auths") or {}
    entry = auths.get(registry or _HUB_KEY) or auths.get(f"https://{registry}") or {}
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        return Credentials(user, password, str(docker))
    config = environ.get("XDG_CONFIG_HOME") or home / ".config"
    enroot = Path(environ.get("ENROOT_CONFIG_PATH") or Path(config) / "enroot") / ".credentials"
    if enroot.is_file():
        try:
            found = netrc.netrc(str(enroot)).authenticators(registry or _HUB_API)
        except netrc.NetrcParseError as error:
            what = f"{enroot} can't be read: line {error.lineno} is not of netrc's form"
            raise UserError(Problem(what, fix="machine REGISTRY login USER password KEY")) from None
        if found:
            return Credentials(found[0], os.path.expandvars(found[2] or ""), str(enroot))
    return None


class _Client:
    def __init__(self, image: Reference, credentials: Credentials | None):
        self.image, self.credentials = image, credentials
        registry = image.registry or _HUB_API
        name = image.repository if image.registry or "/" in image.repository else f"library/{image.repository}"
        near = re.match(r"(localhost|127\.)", registry)  # docker, too, speaks without TLS to these alone
        self.base = f"{'http' if near else 'https'}://{registry}/v2/{name}"
        self.authorization = ""

    def get(self, path: str, accept: tuple[str, ...]) -> tuple[bytes, str, str]:
        """(body, content type, digest as the registry says it)."""
        request = urllib.request.Request(f"{self.base}/{path}", headers={"Accept": ", ".join(accept)})
        try:
            try:
                return self._send(request)
            except urllib.error.HTTPError as error:
                if error.code != 401 or self.authorization:
                    raise
                self.authorization = self._authorize(error.headers.get("WWW-Authenticate", ""))
                return self._send(request)
        except urllib.error.HTTPError as error:
            raise UserError(self._refused(error.code)) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            what = f"registry {self.image.registry or 'docker.io'} does not answer: {reason}"
            raise UserError(Problem(what, self.image.for_docker, "try again with a network")) from None

    def _send(self, request: urllib.request.Request) -> tuple[bytes, str, str]:
        if self.authorization:
            # Not kept on a redirect: blobs come from other hosts, which must not see it.
            request.add_unredirected_header("Authorization", self.authorization)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            headers = answer.headers
            kind = headers.get("Content-Type", "").partition(";")[0]
            return answer.read(), kind, headers.get("Docker-Content-Digest", "")

    def _authorize(self, challenge: str) -> str:
        """https://distribution.github.io/distribution/spec/auth/token/"""
        scheme, _, rest = challenge.partition(" ")
        basic = ""
        if self.credentials:
            pair = f"{self.credentials.user}:{self.credentials.password}"
            basic = "Basic " + base64.b64encode(pair.encode()).decode()
        if scheme.lower() != "bearer":
            return basic or "Basic "
        told = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        wanted = {key: told[key] for key in ("service", "scope") if key in told}
        request = urllib.request.Request(f"{told['realm']}?{urllib.parse.urlencode(wanted)}")
        if basic:
            request.add_unredirected_header("Authorization", basic)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            tree = json.loads(answer.read())
        return f"Bearer {tree.get('token') or tree['access_token']}"

    def _refused(self, code: int) -> Problem:
        name = self.image.for_docker
        if code == 404:
            return Problem(f"there is no image {name}", fix="look at the tags that the registry has")
        if code in (401, 403):
            tried = f"the credentials of {self.credentials.source}" if self.credentials else "no credentials"
            fix = f"docker login {self.image.registry or 'docker.io'}"
            if self.image.registry == "nvcr.io":
                fix = "export NGC_API_KEY=... (from ngc.nvidia.com), or docker login nvcr.io with user $oauthtoken"
            return Problem(f"the registry does not show {name} ({code}); {tried} were used", fix=fix)
        return Problem(f"the registry answers {code} for {name}", fix="try again later")
