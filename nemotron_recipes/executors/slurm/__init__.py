"""Executor `slurm`: batch jobs on a cluster whose commands and shared file system are at hand, here or over SSH."""
