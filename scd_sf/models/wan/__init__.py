"""Wan's own parts: transformer, text encoder, VAE; its layouts, names and configs."""
