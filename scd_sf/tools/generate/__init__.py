"""Clips made by a bidirectional teacher: the training data of stage 2."""
