"""Which batch and draft length suit a machine: so far the prediction from public figures, no measurement.

`chips` knows the machines, `known_models` the models, `cost_model` what a round costs, `report` puts it in a table.
"""
