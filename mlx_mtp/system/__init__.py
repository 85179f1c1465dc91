"""The machine: Metal's settings, wired memory, and a fast BLAS on Linux."""
