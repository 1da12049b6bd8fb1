"""Floor 1: Transformers as single-device code plus logical axis names."""
