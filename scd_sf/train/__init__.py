"""Training machinery (floor 4): engines, averaging, schedules and the run directory. Knows no model and no loss."""
