"""From conditions and seeds to frames: the one way that every command, pipeline, preview, probe and
benchmark takes."""
