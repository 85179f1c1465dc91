"""What batch and draft length should bring on a chip that isn't at hand, predicted from public figures.

Nothing is measured. `chips` knows the machines, `known_models` the models, `kernels` and `cost_model` what a round
costs; `report` tabulates it.
"""
