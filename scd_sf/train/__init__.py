"""Training machinery: engines, averaging, schedules and the run directory. Knows no model and no
loss."""
