"""Write a Llama-shaped checkpoint of random weights, in memory of one pool, with a tokenizer.

Weights are normal with standard deviation 0.02 (norms one), so that activations stay finite;
each tensor is made of stretches of a pool of random numbers that begin anywhere in it. With
`--real-layers N` the layers from N on are holes in the files: a checkpoint larger than the disk.
The tokenizer is that of pkt's built-in pair. `--shape llama-2-70b` and others set all sizes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from pkt.cli.demo import unpack

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
CODES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
POOL = (1 << 26) + 4099

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")
SHAPES = {
    "llama-2-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama-2-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama-2-70b": (80, 8192, 28672, 64, 8, 32000),
    "qwen2.5-72b": (80, 8192, 29568, 64, 8, 152064),
    "mistral-large": (88, 12288, 28672, 96, 8, 32768),
    "llama-3-405b": (126, 16384, 53248, 128, 8, 128256),
}


def shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    head = args.hidden // args.heads
    rows = {
        "self_attn.q_proj": (args.heads * head, args.hidden),
        "self_attn.k_proj": (args.kv_heads * head, args.hidden),
        "self_attn.v_proj": (args.kv_heads * head, args.hidden),
        "self_attn.o_proj": (args.hidden, args.heads * head),
        "mlp.gate_proj": (args.ffn, args.hidden),
        "mlp.up_proj": (args.ffn, args.hidden),
        "mlp.down_proj": (args.hidden, args.ffn),
        "input_layernorm": (args.hidden,),
        "post_attention_layernorm": (args.hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab, args.hidden)}
    for layer in range(args.layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in rows.items()}
    found["model.norm.weight"] = (args.hidden,)
    found["lm_head.weight"] = (args.vocab, args.hidden)
    return found


def write_shard(
    path: Path,
    shard: dict[str, tuple[int, ...]],
    args: argparse.Namespace,
    pool: torch.Tensor,
    choose: random.Random,
) -> int:
    """One file; layers from ``--real-layers`` on are holes in it, which read as zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        begin, end = end, end + torch.Size(shape).numel() * pool.element_size()
        header[name] = {"dtype": CODES[args.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard.items():
            left = torch.Size(shape).numel()
            layer = name.removeprefix("model.layers.").split(".")[0]
            if layer.isdigit() and int(layer) >= args.real_layers:
                file.seek(left * pool.element_size(), 1)
                continue
            written += left * pool.element_size()
            if len(shape) == 1:
                file.write(raw(torch.ones(shape, dtype=pool.dtype)))
                continue
            while left:
                start = choose.randrange(POOL // 2)
                part = pool[start : start + left]
                file.write(raw(part))
                left -= len(part)
        file.truncate(8 + len(text) + end)
    return written


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def write(args: argparse.Namespace) -> None:
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[args.dtype]
    shards: list[list[str]] = [[]]
    held = 0
    every = shapes(args)
    for name, shape in every.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if held and held + size > args.shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    # An odd number of elements: where a matrix is longer than the pool, its rows still differ.
    generator = torch.Generator().manual_seed(args.seed)
    pool = torch.empty(POOL).normal_(0, 0.02, generator=generator).to(dtype)
    choose = random.Random(args.seed)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        shard = {name: every[name] for name in names}
        written = write_shard(folder / file, shard, args, pool, choose)
        print(f"{file}: {written / 1e9:.2f} GB written", flush=True)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    (folder / "model.safetensors.index.json").write_text(index_text)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": args.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    unpack(folder / "pair")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "pair" / "stories260k" / file, folder / file)
    shutil.rmtree(folder / "pair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    for name, default in (
        ("hidden", 4096), ("ffn", 11008), ("layers", 28), ("heads", 32), ("kv-heads", 32),
        ("vocab", 32000), ("shard-bytes", 4_000_000_000), ("seed", 0), ("real-layers", 1000),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    known, _ = parser.parse_known_args()
    if known.shape:
        parser.set_defaults(**dict(zip(SIZES, SHAPES[known.shape], strict=True)))
    write(parser.parse_args())


if __name__ == "__main__":
    main()
