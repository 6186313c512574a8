"""With slurm/nemo_run.py and slurm/nemo_experiment.py the only importer of NeMo-Run: a local stage as its experiment.

NeMo-Run 0.11.1 hands a local job to TorchX, whose scheduler changes what it is given (torchx/schedulers/
local_scheduler.py): it substitutes `${app_id}`, `$$` and the like in arguments, puts the working folder in front of
PATH, adds TORCHELASTIC_ERROR_FILE, PET_LOG_DIR and other variables, copies the output by polling threads, and reports
no more than SUCCEEDED or FAILED. So the scheduler below is given the stage's process, which runs already: exactly as
it was planned, and while NeMo-Run is being imported, which takes a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from nemotron_recipes.errors import Problem
from nemotron_recipes.executors import folders
from nemotron_recipes.spec import RenderedStage

HOME_ENV = "NEMORUN_HOME"
LEFT_OUT = "leptonai"
_ALONE = threading.RLock()  # modules are hidden for all threads
_SCHEDULER = "local_persistent"  # the name under which NeMo-Run registers its local scheduler


def home_problems() -> list[Problem]:
    """NEMORUN_HOME is set to what NeMo-Run can't write to."""
    named = os.environ.get(HOME_ENV)
    said = folders.refusal(Path(named)) if named else ""
    return [Problem(said, HOME_ENV, "name another folder, or unset it: then a run's own is used")] if said else []


@contextmanager
def imported() -> Iterator[None]:
    """NeMo-Run without torch and leptonai, for who reads or renders with it: with no home set, none is named or made.

    NeMo-Run imports torch, where it is installed, only to write dtypes to YAML, and leptonai for an executor that is
    not used here; either takes about as long as all the rest (docs/bench.md). The body does not find torch, and finds
    a stand-in for leptonai; afterwards both can be imported as ever. What is loaded already stays as it is.
    """
    with _ALONE, _without_costly_imports():
        import_module("nemo_run")
        yield


@contextmanager
def _without_costly_imports() -> Iterator[None]:
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    finder = _StandIns(LEFT_OUT)
    if LEFT_OUT not in sys.modules:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


@contextmanager
def adopted(stage: RenderedStage, process: subprocess.Popen[bytes], home: Path, job: str) -> Iterator[None]:
    """Have NeMo-Run know `process`, which runs `stage`, as the experiment `<stage>_<job>`; closes it afterwards.

    process  leads a session of its own
    home     for NeMo-Run's own files, unless the user has set NEMORUN_HOME; of a process's first call, since NeMo-Run
             makes a path below it a constant when it is imported
    job      unique among all runs in NeMo-Run's home

    The body must not end before the process has: NeMo-Run would wait for it.
    """
    os.environ[HOME_ENV] = os.environ.get(HOME_ENV) or str(home)
    with imported():
        import nemo_run
    experiment = nemo_run.Experiment(
        stage.name,
        id=f"{stage.name}_{job}",
        base_dir=os.environ[HOME_ENV],
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
    )
    experiment._runner._scheduler_factories = {_SCHEDULER: _factory(process)}
    script = nemo_run.Script(
        entrypoint=stage.argv[0],
        path=_escaped(stage.argv[1]),
        args=[_escaped(argument) for argument in stage.argv[2:]],
    )
    with experiment:
        experiment.add(script, executor=nemo_run.LocalExecutor(), name=stage.name)
        experiment.run()
        save(experiment)
        yield


def save(experiment: Any) -> None:
    """Write an experiment that is silent here so that `nemo experiment status` prints what it finds."""
    experiment.clean_mode = False
    experiment._save_experiment(exist_ok=True)
    experiment.clean_mode = True


class _StandIns(MetaPathFinder, Loader):
    """In place of a package and all below it: modules in which every name is a class that can't be made."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.made: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == self.package else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.made.append(module.__name__)
        module.__getattr__ = _stand_in  # type: ignore[method-assign]  # https://peps.python.org/pep-0562/


def _stand_in(name: str) -> type:
    def refuse(self: object, *args: object, **options: object) -> None:
        raise ImportError(f"{LEFT_OUT} was left out when NeMo-Run was imported; {name} is a stand-in")

    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": refuse})


def _factory(process: subprocess.Popen[bytes]) -> Callable[..., Any]:
    """What TorchX calls for a scheduler."""
    from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler
    from torchx.schedulers.local_scheduler import CWDImageProvider, _LocalReplica

    class AdoptingScheduler(PersistentLocalScheduler):
        """Starts nothing."""

        def _popen(self, role_name: str, replica_id: int, replica_params: Any) -> Any:
            return _LocalReplica(role_name, replica_id, process, None, None, None, "<N/A>")

    def make(session_name: str, **options: Any) -> AdoptingScheduler:
        return AdoptingScheduler(session_name, CWDImageProvider, experiment=options.get("experiment"))

    return make


def _escaped(argument: str) -> str:
    """TorchX sends each argument through string.Template once: `$$` comes out as `$`."""
    return argument.replace("$", "$$")
