"""Measures conversion: its peak memory for a size of checkpoint, and the effect of 4 bits on a drafter's acceptance.

    python scripts/measure_convert.py memory --folder DIR --gigabytes 8      # needs 1.5 times the space
    python scripts/measure_convert.py acceptance

`memory` writes a checkpoint of random weights in shards, converts it in a separate process, prints that process's peak
memory, and deletes the checkpoint and the result. `acceptance` converts the embedded pair and evaluates it on texts
like those of its training and on other pages; it needs the project's extra `test`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
import numpy as np

from mlx_mtp.system.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx

import mlx_mtp
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.config import SLIDING, target_config
from mlx_mtp.models.target import Target
from weights_convert.check import compare
from weights_convert.converter import convert

SHARD_BYTES = 3 * 10**9
RANDOM_BYTES = 2**26
"""Bytes of random weights that are generated once and repeated: their values don't matter."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory")
    memory.add_argument("--folder", type=Path, required=True, help="where there is room")
    memory.add_argument("--gigabytes", type=float, default=8.0)
    memory.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    worker = commands.add_parser("convert-here", help="(used by `memory`)")
    worker.add_argument("source", type=Path)
    worker.add_argument("destination", type=Path)
    worker.add_argument("bits", type=int)
    kept = commands.add_parser("acceptance")
    kept.add_argument("--prompts", type=int, default=8, help="of each kind of text")
    options = parser.parse_args()
    if options.command == "memory":
        measure_memory(options.folder, int(options.gigabytes * 1e9), options.bits)
    elif options.command == "convert-here":
        print(json.dumps(convert_here(options.source, options.destination, options.bits)))
    else:
        measure_acceptance(options.prompts)


def measure_memory(folder: Path, size: int, bits: list[int]) -> None:
    """Prints a table: peak memory and time of converting a checkpoint of about `size` bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source = Path(place) / "source"
        written, largest = write_checkpoint(source, size)
        print(f"{written / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files; ", end="")
        print(f"largest tensor {largest / 1e9:.2f} GB\n")
        print("| bits | peak RSS, MB | of it before | peak of MLX, MB | seconds | MB/s read | result, GB |")
        print("|---|---|---|---|---|---|---|")
        for wanted in bits:
            destination = Path(place) / "result"
            command = [sys.executable, __file__, "convert-here", str(source), str(destination), str(wanted)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            it = json.loads(done.stdout)
            result = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
            shutil.rmtree(destination)
            print(
                f"| {wanted} | {it['peak_rss'] / 1e6:.0f} | {it['rss_before'] / 1e6:.0f} | {it['peak_mlx'] / 1e6:.0f} "
                f"| {it['seconds']:.0f} | {written / 1e6 / it['seconds']:.0f} | {result / 1e9:.2f} |",
                flush=True,
            )


def convert_here(source: Path, destination: Path, bits: int) -> dict[str, float]:
    """Converts in this process, and prints time and peak memory."""
    before, start = _peak_rss(), time.perf_counter()
    convert(source, destination, Scheme(Format(bits)))
    seconds = time.perf_counter() - start
    return {"rss_before": before, "peak_rss": _peak_rss(), "peak_mlx": mx.get_peak_memory(), "seconds": seconds}


def _peak_rss() -> int:
    """Peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_checkpoint(folder: Path, size: int) -> tuple[int, int]:
    """Writes a bfloat16 checkpoint of E4B's shapes, with as many layers as fit into `size` bytes.

    Returns:
        Bytes of all tensors, and of the largest.
    """
    folder.mkdir(parents=True)
    config = next(c for c in map(_config, range(42, 0, -6)) if _bytes(c) <= size or len(_layers(c)) == 6)
    (folder / "config.json").write_text(json.dumps(config))
    rng, index, shards = np.random.default_rng(0), {}, _shards(config)
    block = (rng.standard_normal(RANDOM_BYTES // 4).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for tensor, shape in shard:
            start, end = end, end + 2 * _product(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        content = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            for _ in range(end // block.nbytes):
                file.write(block)
            file.write(block.tobytes()[: end % block.nbytes])
        index |= {tensor: name for tensor, _ in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return _bytes(config), max(2 * _product(shape) for _, shape in _tensors(config))


def _config(layers: int) -> dict[str, Any]:
    rope = {"full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}, SLIDING: {"rope_theta": 1e4}}
    return {
        "model_type": "gemma4",
        "text_config": {
            "global_head_dim": 512,
            "head_dim": 256,
            "hidden_size": 2560,
            "hidden_size_per_layer_input": 256,
            "intermediate_size": 10240,
            "layer_types": ([SLIDING] * 5 + ["full_attention"]) * (layers // 6),
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
            "sliding_window": 512,
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
        },
    }


def _layers(config: dict[str, Any]) -> list[str]:
    return config["text_config"]["layer_types"]


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    from mlx.utils import tree_flatten

    for name, value in tree_flatten(Target(target_config(config).text).parameters()):
        yield f"model.language_model.{name}", value.shape


def _bytes(config: dict[str, Any]) -> int:
    return sum(2 * _product(shape) for _, shape in _tensors(config))


def _product(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shards(config: dict[str, Any]) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = []
    size = SHARD_BYTES
    for name, shape in _tensors(config):
        added = 2 * _product(shape)
        if size + added > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += added
    return shards


def measure_acceptance(prompts: int) -> None:
    """Prints two tables: the embedded drafter in several formats beside the target as stored, and the target itself."""
    from scripts.demo_pair.evaluate import DRAFTS, evaluate

    pair = Path(mlx_mtp.__file__).parent / "demo"
    formats = [None, Format(8), Format(4), Format.make("mxfp4"), Format(3), Format(2)]
    with tempfile.TemporaryDirectory() as place:
        for i, how in enumerate(formats):
            folder = Path(place) / str(i)
            drafter = convert(pair / "drafter", folder / "drafter", Scheme(how) if how else None)
            (folder / "target").symlink_to(pair / "target")
            rows = evaluate(folder, prompts)
            if i == 0:
                print(f"Drafts accepted of {DRAFTS}, {prompts} prompts of each of {len(rows)} kinds\n")
                print("| drafter | bytes | conversations: greedy | sampled | pages: greedy | sampled |")
                print("|---|---|---|---|---|---|")
            size = (drafter / "model.safetensors").stat().st_size
            talk, pages = rows[:-1], rows[-1:]
            means = [
                sum(getattr(row, at) for row in of) / len(of) for of in (talk, pages) for at in ("greedy", "sampled")
            ]
            print(f"| {_name(how)} | {size:,} | {' | '.join(f'{mean:.2f}' for mean in means)} |", flush=True)
        print("\n| target | KL divergence, nats a token | same best token |\n|---|---|---|")
        for how in (Format(8), Format(6), Format(4)):
            it = compare(pair / "target", convert(pair / "target", Path(place) / f"target {how}", Scheme(how)))
            print(f"| {_name(how)} | {it.kl:.4f} | {it.top1:.1%} |", flush=True)


def _name(how: Format | None) -> str:
    return str(how) if how else "bfloat16"


if __name__ == "__main__":
    main()
