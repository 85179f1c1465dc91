"""Which batch and draft length suit a machine: measured on this one, or predicted from public figures for another.

`measure` times rounds and counts acceptance, `choose` picks a setting, `profile` keeps it. For predictions, `chips`
knows the machines, `known_models` the models, `cost_model` what a round costs, `report` puts it in a table.
"""

from typing import Literal, get_args

Objective = Literal["balanced", "latency", "throughput"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""balanced: most tokens a second in all while a row keeps its share (report.BALANCED_SHARE) of what plain decoding
gives it alone. latency: the fastest single row. throughput: most tokens a second in all."""
