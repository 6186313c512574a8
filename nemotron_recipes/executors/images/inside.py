"""What an image's Python says when it is asked to import something. Its text is given to `python -c` there, so it needs
nothing of this project and no library: standard library only.

    python -c TEXT cpu|gpu '["NAME", ...]' '["PACKAGE", ...]'

NAME     as `spec.Launch.imports` has it
PACKAGE  whose version is told as well; "cuda" is the image's own
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from typing import Any

MARK = "nemotron-trial "  # before the one line that is the answer: what is imported may print whatever it likes
_LONGEST = 400  # characters of an error


def main(argv: list[str]) -> None:
    """Print the answer: {"failed": [[name, why], ...], "versions": {package: version}, "python": version}."""
    gpu, names, packages = argv[0] == "gpu", json.loads(argv[1]), json.loads(argv[2])
    failed: list[list[str]] = []
    while names:  # a library that takes its process down with it is named as well
        names = _tried(names, gpu, failed)
    told = {"failed": failed, "versions": _versions(packages), "python": sys.version.split()[0]}
    print(f"\n{MARK}{json.dumps(told)}", flush=True)


def _tried(names: list[str], gpu: bool, failed: list[list[str]]) -> list[str]:
    """Import them in a process of their own; those that are left when it did not live to the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as answer:
            for name in names:
                print(json.dumps([name, _refusal(name, gpu)]), file=answer, flush=True)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = [json.loads(line) for line in answer]
    _, status = os.waitpid(child, 0)
    failed += [[name, why] for name, why in said if why]
    left = names[len(said) :]
    if left:
        how = "its process ended"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            how += f" with signal {number} ({signal.Signals(number).name})"
        failed.append([left[0], how])
    return left[1:]


def _refusal(name: str, gpu: bool) -> str:
    """Why it is not there; "" when it is."""
    found: list[str] = []
    for each in name.split("|"):
        try:
            _find(each, gpu)
        except BaseException as error:  # noqa: BLE001  of a library: whatever it raises, it is unusable
            found.append(f"{type(error).__name__}: {error}"[:_LONGEST])
        else:
            return ""
    return "; ".join(dict.fromkeys(found))


def _find(name: str, gpu: bool) -> None:
    if "/" in name:
        package, _, path = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}")
        folders = list(spec.submodule_search_locations or [])
        if not any(os.path.exists(os.path.join(folder, path)) for folder in folders):
            where = os.path.normpath(os.path.join(*folders[:1], path))
            raise FileNotFoundError(f"there is no {where}")
        return
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for each in attribute.split(".") if attribute else ():
        found = getattr(found, each)
    if name == "torch" and gpu:  # that a wheel has no kernels for this GPU shows in no import
        found.ones(8, 8, device="cuda").sum().item()


def _versions(packages: list[str]) -> dict[str, str]:
    """Of those that are installed."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            version = os.environ.get("CUDA_VERSION", "") if name == "cuda" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found |= {name: version} if version else {}
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
