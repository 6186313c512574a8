"""Every effect of a command in one place: prepare (reads only), submit, watch, cancel, apply.

`prepare` is all that `--dry-run` does; `submit` sends exactly what `prepare` returned.
"""

from nemotron_recipes.lifecycle.examining import examine
from nemotron_recipes.lifecycle.mirroring import mirror
from nemotron_recipes.lifecycle.preparing import (
    Prepared,
    checked_profile,
    load_plan,
    plan,
    prepare,
    prepare_again,
    rendered,
    rendered_json,
    reprepare,
    save_plan,
    site_of,
)
from nemotron_recipes.lifecycle.runs import (
    ask_seconds,
    cancel,
    detaches,
    differences,
    left_behind,
    liveness,
    load,
    load_all,
    look,
    newest_runs,
    shell,
    waits,
)
from nemotron_recipes.lifecycle.stores import store_of, verify
from nemotron_recipes.lifecycle.submitting import check, submit
from nemotron_recipes.lifecycle.watching import watch

__all__ = [
    "Prepared",
    "ask_seconds",
    "cancel",
    "check",
    "checked_profile",
    "detaches",
    "differences",
    "examine",
    "left_behind",
    "liveness",
    "load",
    "load_all",
    "load_plan",
    "look",
    "mirror",
    "newest_runs",
    "plan",
    "prepare",
    "prepare_again",
    "rendered",
    "rendered_json",
    "reprepare",
    "save_plan",
    "shell",
    "site_of",
    "store_of",
    "submit",
    "verify",
    "waits",
    "watch",
]
