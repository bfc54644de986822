"""``scd data``: look after folders of clips, and take data from and to other projects' layouts."""
