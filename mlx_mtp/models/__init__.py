"""The two models as MLX modules: arrays in, arrays out; they know nothing of decoding."""
