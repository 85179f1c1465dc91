"""Two streams in one event loop: they share the running batch, and one of them is cancelled on its way.

python scripts/examples/two_readers.py [MODEL]
"""

from __future__ import annotations

import asyncio
import sys

import mlx_mtp


async def read(lm: mlx_mtp.MTPModel, prompt: str) -> str:
    """Reads a whole answer."""
    return "".join([chunk.text async for chunk in lm.astream(prompt, max_tokens=200, temperature=0)])


async def main() -> None:
    """Starts two answers, gives one of them up after a moment, and waits for the other."""
    with mlx_mtp.load(*sys.argv[1:]) as lm:
        story = asyncio.create_task(read(lm, "Tell me a short story about a fox."))
        other = asyncio.create_task(read(lm, "Tell me a long story about a castle."))
        await asyncio.sleep(0.2)
        other.cancel()  # its row leaves the batch within a round; the story goes on
        print(await story)


if __name__ == "__main__":
    asyncio.run(main())
