"""What serves a run: processes, errors, files that survive a kill, resuming."""
