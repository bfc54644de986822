"""Tensors in, tensors out: attention contexts, KV caches, masks, rotary positions and the Wan
block. Knows no model."""
