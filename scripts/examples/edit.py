"""Changes a text of which most stays as it is: the old text as a prediction makes that fast, and changes nothing else.

python scripts/examples/edit.py [MODEL]
"""

from __future__ import annotations

import sys

import mlx_mtp

REQUEST = "Write a Python function that counts the words of a text."


def main() -> None:
    """Asks for a text, then for it again with the first one as a prediction, and says where the drafts came from."""
    with mlx_mtp.load(*sys.argv[1:]) as lm:
        first = lm.generate(REQUEST, max_tokens=200, temperature=0)
        again = lm.generate(REQUEST, max_tokens=200, temperature=0, prediction=first.text)
        print(again.text)
        same = "the same text" if again.tokens == first.tokens else "another text"
        print(
            f"\n{same} in {again.stats.rounds} rounds instead of {first.stats.rounds}; "
            f"drafts accepted: {again.stats.accepted_by_source}"
        )


if __name__ == "__main__":
    main()
