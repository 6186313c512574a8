"""Executor `docker`: a container per stage on this machine."""
