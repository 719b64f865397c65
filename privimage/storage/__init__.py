"""Files of a run: the run directory, atomic writes, and access by the owner only."""
