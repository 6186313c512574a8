"""What runs and versions look like side by side, as text, pictures and self-contained pages. Reads only."""
