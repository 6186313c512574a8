"""A plan for people: what would run, on what, from which layer each value comes."""

from __future__ import annotations

import json
import shlex

import click

from nemotron_recipes.artifacts.records import command_line
from nemotron_recipes.cli.estimate_text import estimate_lines
from nemotron_recipes.cli.text import short
from nemotron_recipes.config.tree import flatten
from nemotron_recipes.errors import SHOWN, Problem, printable
from nemotron_recipes.lifecycle import Prepared
from nemotron_recipes.spec import Artifact, Code, JobHandle, RenderedStage, StagePlan


def describe(prepared: Prepared) -> str:
    """The whole Plan: stages with provenance, pinned inputs, layout, files, argv, outputs, fingerprints."""
    plan, request = prepared.plan, prepared.plan.request
    lines = [
        f"Plan {plan.id}",
        f"  command   {command_line(plan.title, request.mode, request.profile, request.overrides)}",
        *_code(plan.code),
        f"  run dir   {plan.run_dir}",
        f"  store     {plan.store}",
        *_mirror(plan.wandb),
    ]
    rendered = {stage.name: stage for stage in prepared.rendered.stages}
    for number, stage in enumerate(plan.stages, 1):
        lines += ["", f"Stage {number}/{len(plan.stages)}: {stage.name} -c {stage.config_name}"]
        lines += _stage(stage, rendered.get(stage.name))
    if prepared.rendered.stages:
        lines += ["", "Submitted with", *(f"  {shlex.join(command)}" for command in prepared.rendered.submit)]
    return printable("\n".join(lines))


def submitted(handle: JobHandle, as_json: bool) -> str:
    """What a detached submission prints."""
    if as_json:
        return json.dumps({"run": handle.run, "run_dir": handle.run_dir, "native": handle.native}, sort_keys=True)
    jobs = [f"{stage} {job}" for stage, job in handle.native.get("jobs", {}).items()]
    lines = [f"submitted {handle.run}", *([f"  jobs     {', '.join(jobs)}"] if jobs else [])]
    lines += [f"  follow   nemotron runs logs -f {handle.run}"]
    lines += [f"  state    nemotron runs show {handle.run}", f"  stop     nemotron runs cancel {handle.run}"]
    return printable("\n".join(lines))


def note(handle: JobHandle) -> str:
    """A line on what was left to do after its jobs were in the queue; "" where nothing was."""
    said = handle.native.get("note")
    return printable(f"note: {said}") + "\n" if said else ""


def tell(remarks: list[Problem]) -> None:
    """Say on standard error what whoever submits should know; it is no reason to refuse."""
    for remark in remarks:
        click.echo(printable(f"warning: {remark}"), err=True)


def nothing_to_do(prepared: Prepared, as_json: bool) -> str:
    """Every output exists already: name them."""
    made = {stage.name: stage.reused for stage in prepared.plan.stages if stage.reused}
    if as_json:
        return json.dumps({name: {"artifact": a.label, "digest": a.digest, "uri": a.uri} for name, a in made.items()})
    lines = ["nothing to run: the same config, inputs and code have made these already (--force makes them anew)"]
    return printable("\n".join([*lines, *(f"  {name:<16} {a.label}  {a.uri}" for name, a in made.items())]))


def _mirror(wandb: dict[str, str]) -> list[str]:
    return [f"  mirror    W&B {wandb.get('entity', 'your default entity')}/{wandb['project']}"] if wandb else []


def _code(code: Code) -> list[str]:
    commit = f", git {code.git_commit[:12]}" if code.git_commit else ""
    lines = [f"  code      {short(code.digest)}, nemotron-recipes {code.version}{commit}; a copy travels with the run"]
    lines += [f"            uncommitted: {name}" for name in code.uncommitted[:SHOWN]]
    if len(code.uncommitted) > SHOWN:
        lines.append(f"            ... and {len(code.uncommitted) - SHOWN} more uncommitted files")
    return lines + [f"            left behind: {entry}" for entry in code.left_behind]


def _stage(stage: StagePlan, rendered: RenderedStage | None) -> list[str]:
    place = stage.placement
    lines = [f"  fingerprint  {stage.fingerprint}"]
    if stage.reused:
        lines.append(f"  REUSED       {stage.reused.label}  {short(stage.reused.digest)}  (not run again)")
    profile = f"profile {place.profile}" if place.profile else "this machine"
    layout = f"{place.nodes} node(s) x {place.nproc_per_node} process(es)"
    lines.append(f"  placement    {place.executor} ({profile}), {layout}")
    lines += [f"               {key}: {value!r}" for key, value in place.options.items() if value]
    if rendered:
        lines += [f"  {name:<12} {text}" for name, text in rendered.notes]
    if place.secrets:
        lines.append(f"               secrets passed on by name: {', '.join(place.secrets)}")
    lines += [f"  note         {note}" for note in stage.launch.notes]
    lines += estimate_lines(stage.estimate)
    lines.append("  inputs")
    lines += [f"    {key:<24} {_pinned(artifact)}" for key, artifact in stage.inputs.items()]
    if stage.resume_from:
        lines.append(f"  resumes from {stage.resume_from}")
    lines.append("  outputs")
    lines += [f"    {output.slot:<24} {output.name} (next version)" for output in stage.outputs]
    lines += ["  values (*: differs from the recipe's base, with the layer that set it)", *_values(stage)]
    if rendered:
        lines += _rendered(rendered)
    return lines


def _values(stage: StagePlan) -> list[str]:
    lines = []
    for key, value in flatten({k: v for k, v in stage.config.items() if k != "run"}).items():
        origin = stage.changed.get(key)
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"  {'*' if origin else ' '} {key:<28} {text}" + (f"   <- {origin}" if origin else ""))
    for key, origin in stage.changed.items():
        if key.startswith("run."):
            lines.append(f"  * {key:<28} {json.dumps(flatten(stage.config).get(key))}   <- {origin}")
    return lines


def _pinned(artifact: Artifact) -> str:
    return f"{artifact.label}  {artifact.digest}".strip()


def _rendered(stage: RenderedStage) -> list[str]:
    lines = []
    for path, text in stage.files.items():
        if text.startswith("#!"):  # a script stands there as it is, to be copied out
            lines += [f"  file {path}, until the line of dashes:", *text.splitlines(), "-" * 72]
        else:
            lines += [f"  file {path}", *(f"    | {line}" for line in text.splitlines())]
    lines.append("  environment added")
    lines += [f"    {name}={shlex.quote(value)}" for name, value in sorted(stage.env.items())]
    lines += [f"  runs in {stage.workdir or stage.cwd}", f"    {shlex.join(stage.argv)}"]
    for host, argv in stage.elsewhere.items():
        lines += [f"  and on {host}", f"    {shlex.join(argv)}"]
    return lines
