"""KV of a batch whose rows differ much in length, as its buffers are laid out, for every published configuration.

Seven rows of 500 tokens and one of 16,000, in 16 bits: in the groups that the batch makes, in one rectangular group,
and relative to the rows alone. Computed from shapes; nothing runs.

    python scripts/uneven_kv.py
"""

from __future__ import annotations

from mlx_mtp.kv import kv_bytes
from mlx_mtp.kv.batch import GROUP_SLOTS, in_groups
from mlx_mtp.kv.buffers import capacity_for
from mlx_mtp.simulate.known_models import KNOWN_MODELS, known_pair

LENGTHS = [500] * 7 + [16_000]
BYTES = 2


def main() -> None:
    """Prints the table."""
    print("| | groups | one group |\n|---|---|---|")
    for name in KNOWN_MODELS:
        text = known_pair(name)[0].text
        alone = sum(kv_bytes(text, tokens, BYTES) for tokens in LENGTHS)
        groups = in_groups([capacity_for(tokens) for tokens in LENGTHS], GROUP_SLOTS)
        grouped = sum(len(group) * kv_bytes(text, max(LENGTHS[i] for i in group), BYTES) for group in groups)
        whole = len(LENGTHS) * kv_bytes(text, max(LENGTHS), BYTES)
        print(f"| {name} | {grouped / 1e9:.2f} ({grouped / alone:.2f}) | {whole / 1e9:.2f} ({whole / alone:.1f}) |")


if __name__ == "__main__":
    main()
