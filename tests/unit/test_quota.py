"""Quotas of a folder. The texts follow the manuals of quota(1) and lfs-quota(1); `quota` itself is a fake here."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_recipes.executors import folders

HEAD = "Disk quotas for user me (uid 1000): \n"
COLUMNS = "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
NFS = HEAD + COLUMNS + "nas:/home 90000000  100000000 120000000  0  5000  0  0  0\n"
LUSTRE = "     /lustre/me\n                [2048*]   1024    4096  6d23h    7    0   10      -\n"


def test_what_the_two_commands_print() -> None:
    assert folders.parse_quota(NFS) == (90000000 * 1024, 100000000 * 1024, 120000000 * 1024, 5000, 0, 0)
    assert folders.parse_quota(LUSTRE) == (2048 * 1024, 1024 * 1024, 4096 * 1024, 7, 0, 10)
    assert folders.parse_quota("Disk quotas for user root (uid 0): none\n") is None


@pytest.mark.parametrize("text", ["", HEAD + COLUMNS, "quota: no such thing\n", NFS.replace("5000", "lots"), NFS + NFS])
def test_what_is_not_known_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        folders.parse_quota(text)


@pytest.mark.parametrize(
    ("printed", "state", "words"),
    [
        (None, "ok", "not known: there is no command quota"),
        (NFS, "ok", "92.2 GB of 122.9 GB, 5000 files of no limit"),
        (NFS.replace("90000000 ", "120000000* "), "problem", "it is used up"),
        (NFS.replace("90000000 ", "110000000* "), "warning", "112.6 GB of 122.9 GB"),
        ("Disk quotas for user me (uid 1000): none\n", "ok", "none is set"),
        ("a new format\n", "warning", "not known: quota says 'a new format'"),
    ],
)
def test_what_the_doctor_says(
    printed: str | None, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if printed is not None:
        (tmp_path / "text").write_text(printed)
        fake = tmp_path / "quota"
        fake.write_text(f'#!/bin/sh\nwhile IFS= read -r line; do echo "$line"; done < {tmp_path}/text\n')
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.topic: finding for finding in folders.look_at("store", tmp_path)}["store quota"]
    assert (found.state, words in found.text) == (state, True), found
