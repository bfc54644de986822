"""Runs as files on disk, without account or server: list, show, follow and compare trainings (``scd
runs``)."""
