"""Turns descriptions into records of one form, several at a time: a JSON schema, a batch, and a seed.

python scripts/examples/records.py [MODEL]        # needs the extra `structured`; the embedded pair by default
"""

from __future__ import annotations

import json
import sys

import mlx_mtp

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["person", "city", "thing"]},
        "year": {"type": "integer", "minimum": 0, "maximum": 2100},
    },
    "required": ["name", "kind", "year"],
    "additionalProperties": False,
}
TEXTS = ("Ada wrote the first program in 1843.", "Vienna had a world's fair in 1873.", "The first bicycle is of 1817.")


def main() -> None:
    """Prints a record for each text, as each is finished."""
    form = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}
    with mlx_mtp.load(*sys.argv[1:]) as lm:
        prompts = [f"Make a record of this: {text}" for text in TEXTS]
        for index, answer in lm.generate_each(prompts, seed=1, max_tokens=200, response_format=form):
            if isinstance(answer, mlx_mtp.MTPError):
                raise answer
            print(index, json.loads(answer.text))


if __name__ == "__main__":
    main()
