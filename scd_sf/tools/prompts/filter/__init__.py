"""Filters for lists of users' prompts. The only model is language identification."""
