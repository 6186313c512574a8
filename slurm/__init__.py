"""A private multi-node Slurm on one machine, out of Debian's packages: `slurm/testcluster` (docs/testcluster.md).

    spec        what a cluster is, and where its files lie
    conf        the text of Slurm's configuration files: pure functions
    services    the daemons: command lines, what each needs, when each is ready
    proctree    a process and everything that it started, found and ended as one
    pyxis       builds pyxis_standin.c, which takes the options of Pyxis, and makes images for it
    isolation   host name and /etc/hosts of a node's own
    keeper      the process that holds a cluster: starts and ends daemons, leaves nothing behind
    orphans     what a job step leaves on a node
    clients     Slurm's own commands, asked from outside
    cluster     up, down, kill, start, status
    cli         the command line
    demo        `make slurm-demo`: the tiny pipeline on such a cluster

Standard library only. Nothing here knows of recipes, plans or jobs, but the demo, which types a command.
"""
