"""Tools around the model: plans, data, prompts, runs, pages, chains of commands."""
