"""What `mlx-mtp verify` and `mlx-mtp bench` do: is a pair right on this machine, and how fast is it?

`texts` compares texts with and without drafting, `scores` says how much the target's scores depend on the shape of a
pass, `kernels` sums up the self-test; `speed` measures, `peers` runs other programs on the same weights. The scripts
measure with the same parts. Not here: choosing a batch and a draft length, which is the tuner's (tuning/).
"""
