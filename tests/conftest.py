"""For all tests: a skip is loud, and in CI (CI=true) it is a failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import docker, slurm

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

IN_CI = os.environ.get("CI") == "true"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; read the diff")


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[slurm.Cluster]:
    """A real Slurm: four nodes of two GPUs, accounting, the one account `lab`, a stand-in for Pyxis.

    It is for all tests: leave it idle.
    """
    slurm.require()
    with slurm.cluster("--nodes=4", "--gpus-per-node=2", "--account=lab", "--pyxis-standin") as found:
        yield found


@pytest.fixture(scope="session")
def docker_daemon() -> Iterator[docker.Daemon]:
    """A real docker daemon with the image `docker.IMAGE`. It is for all tests: leave it up."""
    docker.require()
    with docker.daemon() as found:
        yield found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    report = yield  # a whole module that skips itself (importorskip) never reaches the hook above
    _refuse_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("SKIPPED: these tests proved nothing here", sep="!", yellow=True, bold=True)
        for report in skipped:
            terminalreporter.write_line(f"{report.nodeid}: {_reason(report)}", yellow=True)


def _refuse_skip(report: Any) -> None:
    if IN_CI and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = _reason(report)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: a skip is a failure when CI=true ({reason})"


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
