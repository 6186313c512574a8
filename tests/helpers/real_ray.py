"""An interpreter with the real Ray, which comes with NeMo-Run."""

from __future__ import annotations

import sysconfig
import venv
from pathlib import Path


def python(folder: Path, *more: Path) -> Path:
    """One in an environment of its own: with what this one has, and with the folders `more`; `ray` lies beside it."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "places.pth").write_text("".join(f"{place}\n" for place in (*more, sysconfig.get_path("purelib"))))
    program = folder / "bin" / "ray"
    program.write_text(f"#!{folder}/bin/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return folder / "bin" / "python"
