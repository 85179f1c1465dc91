"""What `mlx-mtp doctor` finds out: the machine, what is installed, what is wrong with it and what to do.

`machine` and `software` ask the system, `facts` gathers everything, `problems` judges it, `privacy` takes names and
paths out. Only `facts` imports MLX, and reports it if that fails.
"""
