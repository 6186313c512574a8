"""`nemotron images list | check | import`: what stages run in, held against the registry, brought here once."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemotron_recipes.cli.text import short, table
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.errors import Problem, UserError, printable
from nemotron_recipes.executors.images.enroot import Reference, architecture
from nemotron_recipes.spec import Tree

if TYPE_CHECKING:
    from nemotron_recipes.executors.images.registry import Found
    from nemotron_recipes.executors.remote.transport import Transport


@click.group()
def images() -> None:
    """List the images that stages run in, check them, import one."""


@images.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def list_images(as_json: bool) -> None:
    """What is known of each image, and how; with the digests that the project keeps in images.lock.json."""
    from dataclasses import asdict

    from nemotron_recipes.executors.images import catalog

    known = catalog.all_known()
    if as_json:
        click.echo(json.dumps([asdict(image) for image in known], indent=2))
        return
    rows = [
        (
            image.reference,
            ", ".join(image.backends) or "-",
            ", ".join(image.stages) or "-",
            ", ".join(image.architectures) or "not known",
            short(image.digest) if image.digest else "not known",
            ", ".join(f"{name} {version}" for name, version in image.versions.items()),
        )
        for image in known
    ]
    click.echo(table(("IMAGE", "BACKEND", "STAGES", "ARCHITECTURES", "DIGEST", "VERSIONS"), rows))


@images.command("check")
@click.argument("references", nargs=-1, metavar="[IMAGE]...")
@click.option("--arch", type=click.Choice(("amd64", "arm64", "any")), help="This machine's, unless you name one.")
@click.option("--accept", is_flag=True, help="Keep the digests of now, where the project's own file has others.")
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def check(references: tuple[str, ...], arch: str | None, accept: bool, as_json: bool) -> None:
    """Ask the registries: does each image exist, for this machine, and is it still the one that is known?

    Without IMAGE, all that are listed and come from a registry. Where the list has no digest, the first one that is
    seen goes into images.lock.json beside env.toml, and is held against from then on.
    """
    from nemotron_recipes.executors.images import catalog, lock, registry

    chosen = references or tuple(image.reference for image in catalog.known_images() if not image.recipe)
    wanted = None if arch == "any" else arch or _this_machine()
    problems: list[Problem] = []
    rows, tree, seen = [], [], {}
    for written in chosen:
        named, known = catalog.reference(written), catalog.listed(written) or catalog.Image(written, (), ())
        try:
            found = registry.look_up(named)
        except UserError as error:
            problems += error.problems
            continue
        if named.digest:  # that is the image, whatever its tag has become
            known = replace(known, digest="", digest_from="")
        elif not known.digest or (accept and known.digest_from == lock.NAME):
            seen[lock.name_of(named)] = found.digest
            known = replace(known, digest="", digest_from=lock.NAME if lock.file() else "nowhere")
        problems += catalog.differences(known, found, wanted)
        rows.append((written, ", ".join(found.architectures), found.digest, known.digest_from))
        tree.append({"image": written, "digest": found.digest, "architectures": found.architectures})
    changed = lock.keep(seen)
    if as_json:
        click.echo(json.dumps({"images": tree, "problems": [str(problem) for problem in problems]}, indent=2))
    elif rows:
        click.echo(table(("IMAGE", "ARCHITECTURES", "DIGEST NOW", "KNOWN FROM"), rows))
    if changed:
        click.echo(f"kept in {changed}: a moved tag will show", err=True)
    if problems:
        raise UserError(*problems)


@images.command("import")
@click.argument("written", metavar="IMAGE")
@click.option("--to", "target", type=click.Path(file_okay=False, path_type=Path), help="Folder for the .sqsh file.")
@click.option("-r", "--run", "profile", metavar="PROFILE", help="Let a node of this Slurm profile do it.")
@click.option("--partition", metavar="NAME", help="With --run: of nodes without GPUs; unset: the profile's own.")
@click.option("--arch", metavar="NAME", help="amd64 or arm64; unset: this machine's, or that of the profile's nodes.")
@click.option("--docker", "by_docker", is_flag=True, help="Pull it into this machine's docker, by its digest.")
def import_image(
    written: str,
    target: Path | None,
    profile: str | None,
    partition: str | None,
    arch: str | None,
    by_docker: bool,
) -> None:
    """Bring an image here once, pinned to the digest that its tag has now: as a .sqsh file, or into docker."""
    from nemotron_recipes.executors.images import catalog as catalogue
    from nemotron_recipes.executors.images import registry

    _refuse_mixed(by_docker, target, profile, partition, arch)
    image = catalogue.reference(written)
    if by_docker:
        found = registry.look_up(image)
        _refuse_another(written, found, _this_machine())
        pinned = Reference(image.registry, image.repository, image.tag, found.digest, image.user)
        catalogue.pull(pinned.for_docker)
        click.echo(f"container_image = {json.dumps(pinned.for_docker)}")
        return
    assert target is not None
    file = _import_squashfs(written, target, profile, partition, arch)
    click.echo(f"container_image = {json.dumps(str(file))}")


def _import_squashfs(written: str, target: Path, profile: str | None, partition: str | None, arch: str | None) -> Path:
    """Here; or where the profile's cluster is, on one of its nodes."""
    from nemotron_recipes.executors.images import catalog as catalogue
    from nemotron_recipes.executors.remote import sites, transport
    from nemotron_recipes.lifecycle.reach import speaking_to

    image = catalogue.reference(written)
    complete = _slurm_profile(profile) if profile else {}
    with speaking_to(sites.of_profile(complete)) as where:
        if where.name and not target.is_absolute():
            what = f"--to {target} is a path on {where.name}, and must be a full one"
            raise UserError(Problem(what, "command line", "name a folder there that all nodes see"))
        found = _seen_from(where, written)
        machine = arch or (_of_nodes(complete) if profile else _this_machine())
        _refuse_another(written, found, machine)
        before = _srun(complete, partition) if profile else []
        try:
            return catalogue.import_squashfs(image, found.digest, machine, target.absolute(), before)
        except transport.Unreachable as error:
            fix = "what was begun there goes on: the same command again waits for it, or finds the file"
            raise UserError(Problem(str(error), fix=fix)) from None


def _seen_from(where: Transport, written: str) -> Found:
    """What the registry tells the machine that imports; a login node may have no way to it, and this machine one."""
    from nemotron_recipes.executors.images import importing, registry

    try:
        digest, architectures = where.call(importing.look_up, written)
    except UserError:
        if not where.name:
            raise
        digest, architectures = importing.look_up(written)
    return registry.Found(digest, tuple(architectures))


def _refuse_another(written: str, found: Found, machine: str) -> None:
    """UserError: it is not the image that is known, or none for that machine. Else its digest is kept."""
    from nemotron_recipes.executors.images import catalog as catalogue
    from nemotron_recipes.executors.images import lock

    named, listed = catalogue.reference(written), catalogue.listed(written) or catalogue.Image(written, (), ())
    if named.digest:  # that is the image, whatever its tag was or has become
        listed = replace(listed, digest="", digest_from="")
    problems = [*catalogue.differences(listed, found, machine)]
    if problems:
        raise UserError(*problems)
    if not listed.digest and not named.digest:
        lock.keep({lock.name_of(named): found.digest})


def _refuse_mixed(
    by_docker: bool, target: Path | None, profile: str | None, partition: str | None, arch: str | None
) -> None:
    problems = []
    if by_docker and (target or profile or partition or arch):
        what = "--docker takes neither --to, --run, --partition nor --arch"
        problems.append(Problem(what, "command line", "the image goes to this machine's docker"))
    if not by_docker and target is None:
        problems.append(Problem("where to?", "command line", "--to FOLDER, which all nodes see; or --docker"))
    if partition and not profile:
        problems.append(Problem("--partition goes with --run PROFILE", "command line", "add it, or import it here"))
    if arch not in (None, "amd64", "arm64"):
        problems.append(Problem(f"--arch is amd64 or arm64, not {printable(str(arch))!r}", "command line"))
    if problems:
        raise UserError(*problems)


def _slurm_profile(name: str) -> Tree:
    """UserError: there is none of that name, or it is for no Slurm cluster."""
    from nemotron_recipes.lifecycle.preparing import checked_profile

    profile = checked_profile(read_environment(), name)
    if profile["executor"] != "slurm":
        what = f"profile {name} is of executor {profile['executor']}"
        raise UserError(Problem(what, "command line", "leave --run out: the image is imported here"))
    return profile


def _srun(profile: Tree, partition: str | None) -> list[str]:
    """One task on one node of the cluster that the profile is for."""
    given = {key: profile[key] for key in ("account", "partition", "qos", "time") if profile.get(key)}
    given |= {"partition": partition} if partition else {}
    flags = [f"--{key}={value}" for key, value in given.items()]
    return ["srun", "--nodes=1", "--ntasks=1", "--job-name=nemotron-images", *flags]


def _of_nodes(profile: Tree) -> str:
    """The architecture of the nodes that will run what the profile submits."""
    from nemotron_recipes.executors.slurm import control
    from nemotron_recipes.executors.slurm import site as slurm_site

    try:
        site = slurm_site.read_site()
    except (control.Unreachable, slurm_site.Unreadable) as error:
        raise UserError(
            Problem(f"the nodes' architecture is not known: {error}", fix="--arch amd64, or arm64")
        ) from None
    found = sorted(site.architectures(profile.get("partition")))
    if len(found) != 1:
        what = f"the profile's partition has nodes of {', '.join(found) or 'no known architecture'}"
        raise UserError(Problem(what, "command line", "say for which: --arch amd64, or arm64"))
    return found[0]


def _this_machine() -> str:
    return printable(architecture(platform.machine()))
