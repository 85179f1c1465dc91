"""The calls of a model: their options, the thread that runs them, and the answers they return."""
