"""Floor 1: text sources, tokenisers, packing and loading; batch k is a function of (seed, k) alone."""
