"""What is asked of the machine: Metal's settings, wired memory, and on Linux a fast BLAS."""
