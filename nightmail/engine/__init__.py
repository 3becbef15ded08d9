"""Runs any job, names none: slots, deadlines, leases, run records, ticks."""
