"""Target and drafter as MLX modules: arrays in, arrays out. Not here: decoding."""
