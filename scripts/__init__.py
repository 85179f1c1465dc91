"""Benchmarks, checks and tools for development. They aren't part of the package."""
