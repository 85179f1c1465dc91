"""Decoding: drafting, verifying, accepting; token ids in, token ids out; knows nothing of text."""
