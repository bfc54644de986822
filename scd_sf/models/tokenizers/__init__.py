"""Image tokenizers (DC-AE's kind) and their training."""
