"""Plan many runs, run them, compare them honestly, write a report. Runs are data."""
