"""W&B as a mirror of the file store. The files are the truth; training never waits for it nor fails by it.

journal.py  what is to be mirrored, and what has been: append-only files in the run folder. Standard library only
sync.py     starts a process a run that replays the journal, and ends one that gets stuck
replay.py   that process: the only place, beside pull.py, where wandb is imported
lease.py    lets only one such process tell W&B of a run, on whatever host; scratch.py: its temporary files
telling.py  what it tells: W&B runs with their curves, artifacts, aliases
offline.py  reads what a trainer logged to W&B by itself; media.py makes its tables and pictures anew
names.py    which W&B names, aliases and types artifacts get
pull.py     an artifact that exists only in W&B becomes a version in the store
"""
