"""Write a Llama-shaped checkpoint of random weights, shard by shard, with a tokenizer.

Weights are normal with standard deviation 0.02 (norms one), drawn anew for every tensor, so that
activations stay finite and files do not compress. The tokenizer is that of pkt's built-in pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from pkt.cli.demo import unpack

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


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
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        generator = torch.Generator().manual_seed(args.seed * 1000 + index)
        tensors = {}
        for name in names:
            if len(every[name]) == 1:
                tensors[name] = torch.ones(every[name], dtype=dtype)
            else:
                tensors[name] = torch.empty(every[name], dtype=dtype).normal_(
                    0, 0.02, generator=generator
                )
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        print(f"{file}: {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB", flush=True)
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
    for name, default in (
        ("hidden", 4096), ("ffn", 11008), ("layers", 28), ("heads", 32), ("kv-heads", 32),
        ("vocab", 32000), ("shard-bytes", 4_000_000_000), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    write(parser.parse_args())


if __name__ == "__main__":
    main()
