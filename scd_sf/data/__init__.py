"""Typed batches from disk. Every directory explains itself by a manifest with sizes and hashes."""
