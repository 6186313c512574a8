"""Executor `local`: processes on this machine."""
