"""``scd serve``: type a prompt and watch the video as it is made (docs/how_to/live.md)."""
