"""Training recipes for the Nemotron family: one command becomes one Plan, on one machine or on many."""

__version__ = "0.1.0"
