"""The thirteen jobs and their table; nothing else."""
