"""A language model writes short prompts out at length, as Wan 2.1's own prompts are."""
