"""Doing things where the run is: here, or on a machine that is reached over SSH."""
