"""What a registry says of an image: its digest now, and for which architectures it is. The protocol is OCI's
distribution specification (https://github.com/opencontainers/distribution-spec), read with the standard library.

Credentials (credentials.py) are never printed: not in an error either.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.executors.images.credentials import HUB_API, Credentials, find_credentials
from nemotron_recipes.executors.images.enroot import Reference

_SECONDS = 30.0
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")


@dataclass(frozen=True)
class Found:
    """digest: of the manifest or index that the tag names now."""

    digest: str
    architectures: tuple[str, ...]


class Absent(UserError):
    """The registry has no such image."""


class Unanswered(UserError):
    """The registry does not answer, does not let us see it, or says what nobody understands: nothing is known."""


def look_up(image: Reference, environ: Mapping[str, str] = os.environ, seconds: float = _SECONDS) -> Found:
    """Ask the image's registry; `seconds` for each of up to four questions.

    Absent, Unanswered; or UserError: the credentials that are there can't be used.
    """
    client = _Client(image, find_credentials(image.registry, environ), seconds)
    try:
        body, kind, told = client.get(f"manifests/{image.digest or image.tag or 'latest'}", (*_INDEXES, *_MANIFESTS))
        digest = told or f"sha256:{hashlib.sha256(body).hexdigest()}"
        manifest = json.loads(body)
        if kind in _INDEXES:
            platforms = [entry.get("platform", {}) for entry in manifest["manifests"]]
            known = {p["architecture"] for p in platforms if p.get("architecture") not in (None, "unknown")}
            return Found(digest, tuple(sorted(known)))
        config, _, _ = client.get(f"blobs/{manifest['config']['digest']}", ("*/*",))
        return Found(digest, (str(json.loads(config).get("architecture", "unknown")),))
    except (ValueError, KeyError, TypeError, AttributeError):  # a proxy's page, mostly
        what = f"{image.registry or 'docker.io'} does not answer as a registry does"
        raise Unanswered(Problem(what, image.for_docker, "is a proxy in between?")) from None


class _Client:
    def __init__(self, image: Reference, credentials: Credentials | None, seconds: float):
        self.image, self.credentials, self.seconds = image, credentials, seconds
        registry = image.registry or HUB_API
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
            raise (Absent if error.code == 404 else Unanswered)(self._refused(error.code)) from None
        except (OSError, http.client.HTTPException) as error:  # URLError, TimeoutError, ConnectionError among them
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            what = f"registry {self.image.registry or 'docker.io'} does not answer: {reason}"
            raise Unanswered(Problem(what, self.image.for_docker, "try again with a network")) from None

    def _send(self, request: urllib.request.Request) -> tuple[bytes, str, str]:
        if self.authorization:
            # Not kept on a redirect: blobs come from other hosts, which must not see it.
            request.add_unredirected_header("Authorization", self.authorization)
        with urllib.request.urlopen(request, timeout=self.seconds) as answer:
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
        with urllib.request.urlopen(request, timeout=self.seconds) as answer:
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
