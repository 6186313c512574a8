"""From rows to training data: read, normalise, render, encode, pack, write. Policy and formats: docs/data.md."""
