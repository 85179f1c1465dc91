"""Predicts the speed of batch sizes and draft lengths on Apple's chips from public figures; nothing is measured.

`chips` has the machines, `known_models` the models, `kernels` and `cost_model` the time of a round, `report` the best
settings. Not here: measuring a machine at hand (tuning/).
"""
