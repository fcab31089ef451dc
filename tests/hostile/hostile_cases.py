"""Model folders that damage, carelessness or malice may leave, a line each."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from hostile_models import (
    EMBEDDING,
    FILE,
    INDEX,
    LARGEST,
    SHAPES,
    Case,
    Q,
    Shard,
    added,
    config,
    entry,
    file,
    gone,
    header,
    index,
    instead,
    length,
    link,
    mapped,
    only_files,
    outside,
    shaped,
    sparse,
    split,
    tail,
    then,
    without,
)


def tensors(*entries: str) -> str:
    """A header of these members, as text."""
    return "{" + ",".join(entries) + "}"


SECOND = [name for name in SHAPES if ".layers.1." in name]
ONE = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADER = "expected a header length from 1 to 100000000"
TWO = ONE.replace('"a"', '"b"')
ALL = f'"a":{{"dtype":"U8","shape":[{LARGEST}],"data_offsets":[0,{LARGEST}]}}'
NOTHING = {
    name: [0, 8]
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "o_proj")
}
DIGITS = added(f"model.layers.{'1' * 5000}.q.weight", "F32", [8, 8], 256)
LISTS = then(config(num_hidden_layers=9), *(added(f"a{i}x.0.w", "U8", [1], 1) for i in range(200)))
FIELDS = "exactly dtype, shape and data_offsets"
OBJECT = "a JSON object that begins with '{'"
REGULAR = "expected a regular file, found"
MAP = "one weight_map that maps every tensor once to a shard"
INSIDE = "expected a *.safetensors file inside the folder"

FILES = [
    Case("empty file", file(b""), "at least 8 bytes, the length of the header, found 0 bytes"),
    Case("seven bytes", file(b"\2\0\0\0\0\0\0"), "at least 8 bytes"),
    Case("length and no header", file(struct.pack("<Q", 2)), "at least 10 bytes"),
    Case("header length 0", length(0), f"{HEADER}, found 0"),
    Case("header length beyond the file", length(10**7), "where the header ends"),
    Case("header length over the cap", length(10**8 + 1), f"{HEADER}, found 100000001"),
    Case("header length with the sign bit", length(2**63), f"{HEADER}, found {2**63}"),
    Case("header length -1", length(LARGEST), f"{HEADER}, found {LARGEST}"),
    Case("header length one short", lambda m: length(len(json.dumps(m.only.header)) - 1)(m), OBJECT),
    Case("a pointer of Git LFS", file(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    Case("a page that says not found", file(b"<!DOCTYPE html><html>404</html>"), HEADER),
    Case("a pickle in a zip by another name", file(b"PK\x03\x04" + bytes(60)), "expected"),
    Case("a header of 99 MB of nothing", instead(FILE, sparse(10**8, struct.pack("<Q", 99999990))), OBJECT),
    Case("data cut short", tail(lambda data: data[:-1]), "the file is truncated"),
    Case("no data", tail(lambda data: b""), "the file is truncated"),
    Case("bytes behind the data", tail(lambda data: data + b"\0"), "bytes follow the last tensor"),
    Case("a folder for a file", instead(FILE, Path.mkdir), f"{REGULAR} a folder"),
    Case("a pipe for a file", instead(FILE, os.mkfifo), f"{REGULAR} a pipe"),
    Case("a device for a file", instead(FILE, link("/dev/zero")), "a link to /dev/zero, outside"),
    Case("a link out of the folder", instead(FILE, outside), "outside"),
    Case("a link to nowhere", instead(FILE, link("nothing")), "a link to nowhere"),
    Case("a link to itself", instead(FILE, link(FILE)), "cannot resolve"),
]  # fmt: skip

HEADERS = [
    Case("not UTF-8", header(b'{"\xff":1}'), "bytes that are not UTF-8 at 2"),
    Case("half a surrogate", header('{"\\ud800":1}'), "malformed JSON"),
    Case("a list", header("[]"), OBJECT),
    Case("a mark of byte order", header("\ufeff{}"), OBJECT),
    Case("a space first", header(" {}"), OBJECT),
    Case("half an object", header('{"a":'), "malformed JSON"),
    Case("two objects", header("{}{}"), "trailing characters"),
    Case("a control character", header('{"a\n":1}'), "control character"),
    Case("lists 100000 deep", header('{"a":' + "[" * 100000), "recursion limit"),
    Case("objects 100000 deep", header('{"a":' * 100000), "malformed JSON: EOF"),
    Case("objects 100000 deep, closed", header('{"a":' * 100000 + "0" + "}" * 100000), "exactly dtype"),
    Case("5 MB of objects in objects", header("{" + ",".join(f'"{i}":' + '{"":' * 100 + "0" + "}" * 100 for i in range(10000)) + "}"), "exactly dtype"),
    Case("no number", header('{"a":NaN}'), "malformed JSON"),
    Case("a number of 100000 digits", header('{"a":' + "9" * 100000 + "}"), "number out of range"),
    Case("a name twice", header(tensors(ONE, ONE)), "tensor 'a': expected every name once"),
    Case("a name twice, once escaped", header(tensors(ONE, ONE.replace("a", "\\u0061", 1))), "every name once"),
    Case("a field twice", header(tensors(ONE[:-1] + ',"shape":[2]}')), "field 'shape' more than once"),
    Case("an entry that is a number", header('{"a":1}'), FIELDS),
    Case("an entry that is null", header('{"a":null}'), FIELDS),
    Case("a field too many", entry(stride=[1]), "also a field 'stride'"),
    Case("a field too few", header('{"a":{"dtype":"F32","shape":[2]}}'), "no field 'data_offsets'"),
    Case("metadata that is a list", header('{"__metadata__":[]}'), "maps every name once to a text"),
    Case("metadata that nests", header('{"__metadata__":{"a":{}}}'), "an object at 'a'"),
    Case("no such dtype", entry(dtype="F4"), "a dtype that pkt reads"),
    Case("a dtype in small letters", entry(dtype="f32"), "a dtype that pkt reads"),
    Case("a dtype that is a number", entry(dtype=4), "a dtype that pkt reads"),
    Case("a dtype of a megabyte", entry(dtype="F" * 10**6), "FFF…"),
    Case("a negative size", entry(shape=[-8, 8]), "the number -8"),
    Case("a broken size", entry(shape=[8.0, 8]), "a shape of at most 64 sizes"),
    Case("a size in quotes", entry(shape=["8", 8]), "a list that holds '8'"),
    Case("65 dimensions", entry(shape=[1] * 65), "a shape of at most 64 sizes"),
    Case("100000 dimensions", entry(shape=[1] * 100000), "a list of 100000"),
    Case("a size beyond 64 bits", entry(shape=[2**64, 8]), "a shape of at most 64 sizes"),
    Case("sizes whose product is 0 in 64 bits", entry(shape=[2**32, 2**32]), "a shape whose bytes fit"),
    Case("sizes whose product is right in 64 bits", entry(shape=[2**63 + 4, 16]), "a shape whose bytes fit"),
    Case("a zero that hides an overflow", entry(shape=[2**40, 0, 2**40]), "a shape whose bytes fit"),
    Case("more elements than bytes", entry(shape=[9, 8]), "expected 288 bytes for F32 [9, 8]"),
    Case("fewer elements than bytes", entry(shape=[8]), "expected 32 bytes for F32 [8]"),
    Case("a dtype of half the bytes", entry(dtype="BF16"), "expected 128 bytes for BF16"),
    Case("a scalar of many bytes", entry(shape=[]), "expected 4 bytes for F32 []"),
    Case("offsets backwards", entry(data_offsets=[256, 0]), "begin ≤ end"),
    Case("three offsets", entry(data_offsets=[0, 1, 2]), "begin ≤ end"),
    Case("negative offsets", entry(data_offsets=[-256, 0]), "begin ≤ end"),
    Case("offsets beyond 64 bits", entry(data_offsets=[2**64, 2**64 + 256]), "begin ≤ end"),
    Case("offsets at the end of 64 bits", entry(data_offsets=[LARGEST - 256, LARGEST]), "a hole"),
    Case("offsets of all 64 bits", header(tensors(ALL)), "truncated"),
    Case("the bytes of another tensor", lambda m: entry(data_offsets=m.only.header[Q.replace("q_", "k_")]["data_offsets"])(m), "an overlap"),
    Case("an overlap of one byte", header(tensors(ONE, TWO.replace("[0,8]", "[7,15]"))), "an overlap"),
    Case("a hole of one byte", header(tensors(ONE, TWO.replace("[0,8]", "[9,17]"))), "a hole"),
    Case("data that begin late", header(tensors(ONE.replace("[0,8]", "[8,16]"))), "a hole"),
    Case("a name that steers the terminal", header('{"\\u001b[2Jpkt: done\\n":1}'), "'\\u{1b}[2Jpkt: done\\u{a}'"),
    Case("a name of a megabyte", header('{"' + "n" * 10**6 + '":1}'), "nnn…"),
]  # fmt: skip

INDICES = [
    Case("no JSON", index("weight_map"), MAP),
    Case("an empty index", index(""), MAP),
    Case("an index in a list", index("[]"), MAP),
    Case("no weight_map", index("{}"), "found no weight_map"),
    Case("an empty weight_map", index('{"weight_map":{}}'), "an empty weight_map"),
    Case("two weight_maps", index('{"weight_map":{"a":"1.safetensors"},"weight_map":{}}'), "more than once"),
    Case("a tensor twice in the index", index('{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}'), "'a' more than once"),
    Case("a shard that is a number", index('{"weight_map":{"a":1}}'), "1 at 'a'"),
    Case("an index 100000 deep", index("[" * 100000), "recursion limit"),
    Case("an index that is not UTF-8", index(b'{"\xff'), "not UTF-8"),
    Case("a huge index", instead(INDEX, sparse(10**13), split), "at most 100000000 bytes of index"),
    Case("an index that is a pipe", instead(INDEX, os.mkfifo, split), f"{REGULAR} a pipe"),
    Case("an index that is a folder", instead(INDEX, Path.mkdir, split), f"{REGULAR} a folder"),
    Case("an index out of the folder", instead(INDEX, outside, split), "outside"),
    Case("a shard that is not there", mapped("3.safetensors"), "3.safetensors: expected a file of the checkpoint"),
    Case("a shard above the folder", mapped("../2.safetensors"), INSIDE),
    Case("a shard above, later in the name", mapped("a/../../2.safetensors"), INSIDE),
    Case("a shard anywhere", mapped("/etc/2.safetensors"), INSIDE),
    Case("a shard of Windows", mapped("..\\2.safetensors"), INSIDE),
    Case("a shard with a zero byte", mapped("2\0.safetensors"), INSIDE),
    Case("a shard without a name", mapped(""), INSIDE),
    Case("a pickle for a shard", mapped("pytorch_model-00001-of-00002.bin"), INSIDE),
    Case("a tensor in no shard", mapped("1.safetensors", "model.layers.0.ghost.weight"), "no such tensor"),
    Case("a tensor in another shard", mapped("1.safetensors"), f"1.safetensors: tensor '{Q}': expected this tensor"),
    Case("a shard that is a pipe", instead("2.safetensors", os.mkfifo, split), f"2.safetensors: {REGULAR} a pipe"),
    Case("a shard that is a folder", instead("2.safetensors", Path.mkdir, split), f"2.safetensors: {REGULAR} a folder"),
    Case("a shard out of the folder", instead("2.safetensors", outside, split), "2.safetensors: expected a file of"),
    Case("a shard of no bytes", then(split, file(b"", "2.safetensors")), "2.safetensors: expected at least 8 bytes"),
    Case("a shard cut short", then(split, last=lambda f: os.truncate(f / "2.safetensors", 3000)), "2.safetensors: expected"),
]  # fmt: skip

FOLDERS = [
    Case("no file", only_files(), "found no safetensors file"),
    Case("a pickle", only_files("pytorch_model.bin"), "found 'pytorch_model.bin': a pickle can run code"),
    Case("another pickle", only_files("consolidated.00.pth"), "a pickle can run code"),
    Case("a model of llama.cpp", only_files("model-q4.gguf"), "pkt does not read GGUF"),
    Case("an adapter", only_files("adapter_model.safetensors"), "found only the adapter"),
    Case("two models", only_files("a.safetensors", "b.safetensors"), "leave one of them"),
    Case("a shard without its index", only_files("model-00001-of-00002.safetensors"), "fetch the index"),
]  # fmt: skip

WHOLE = "expected a whole number"
CONFIGS = [
    Case("no config", gone("config.json"), "found no config.json"),
    Case("an empty config", file(b"", "config.json"), "config.json: cannot be read as JSON"),
    Case("a config that is no JSON", file(b"{'a': 1}", "config.json"), "cannot be read as JSON"),
    Case("a config that is not UTF-8", file(b'{"a":"\xff"}', "config.json"), "cannot be read as JSON"),
    Case("a config that is a list", file(b"[]", "config.json"), "config.json: expected a JSON object"),
    Case("a config 100000 deep", file(b"[" * 100000, "config.json"), "config.json: cannot be read as JSON"),
    Case("a number of 100000 digits in the config", file(b'{"a":' + b"9" * 100000 + b"}", "config.json"), "cannot be read as JSON"),
    Case("a config that is a pipe", instead("config.json", os.mkfifo), "config.json: expected a regular file"),
    Case("a config that is a folder", instead("config.json", Path.mkdir), "config.json: cannot be read as JSON: Is a directory"),
    Case("a config that never ends", instead("config.json", link("/dev/zero")), "config.json: expected a regular file"),
    Case("a huge config", instead("config.json", sparse(10**12)), "config.json: expected at most"),
    Case("no number of layers", config(num_hidden_layers=...), "does not say how many layers", 3),
    Case("no layers", config(num_hidden_layers=0), "num_hidden_layers: expected"),
    Case("fewer than no layers", config(num_hidden_layers=-2), "num_hidden_layers: expected"),
    Case("half a layer", config(num_hidden_layers=1.5), "num_hidden_layers: expected"),
    Case("layers in quotes", config(num_hidden_layers="2"), "num_hidden_layers: expected"),
    Case("layers that are true", config(num_hidden_layers=True), "num_hidden_layers: expected"),
    Case("more layers than there are", config(num_hidden_layers=3), "one run of 3 decoder layers", 3),
    Case("10**18 layers", config(num_hidden_layers=10**18), "num_hidden_layers: expected"),
    Case("no kind of model", config(model_type=...), "names no model_type", 3),
    Case("a kind of model that is a number", config(model_type=7), "model_type: expected a text"),
    Case("a kind of model that steers the terminal", config(model_type="\x1b[2J", num_attention_heads=...), "'\\x1b[2J' names no", 3),
    Case("architectures that are a number", config(architectures=1), "architectures: expected a list"),
    Case("another architecture", config(architectures=["ViTModel"]), "decoder-only", 3),
    Case("an encoder", config(model_type="t5", is_encoder_decoder=True), "decoder-only", 3),
    Case("a model that sees", config(text_config={}), "more than a text decoder", 3),
    Case("quantized weights", config(quantization_config={"quant_method": "awq"}), "quantized (awq)", 3),
    Case("quantized somehow", config(quantization_config=4), "quantized (unknown method)", 3),
    Case("experts", config(num_local_experts=8), "mixture of experts", 3),
    Case("experts in quotes", config(num_local_experts="8"), f"num_local_experts: {WHOLE}"),
    Case("no heads", config(num_attention_heads=...), "names no attention heads", 3),
    Case("0 heads", config(num_attention_heads=0), f"num_attention_heads: {WHOLE}"),
    Case("heads in words", config(num_attention_heads="two"), f"num_attention_heads: {WHOLE}"),
    Case("heads in a list", config(num_attention_heads=[2, 2]), f"num_attention_heads: {WHOLE}"),
    Case("fewer than no heads", config(num_attention_heads=-2), f"num_attention_heads: {WHOLE}"),
    Case("kv heads in words", config(num_key_value_heads="two"), f"num_key_value_heads: {WHOLE}"),
    Case("fewer than no kv heads", config(num_key_value_heads=-1), f"num_key_value_heads: {WHOLE}"),
    Case("a broken head", config(head_dim=2.5), f"head_dim: {WHOLE}"),
    Case("positions in words", config(max_position_embeddings="many"), f"max_position_embeddings: {WHOLE}"),
]  # fmt: skip

TENSORS = [
    Case("no embedding", without("embed_tokens.weight", "lm_head.weight"), "no input embedding", 3),
    Case("an embedding that is a vector", shaped(embed_tokens=[32]), f"tensor '{EMBEDDING}' in {FILE}: expected a matrix"),
    Case("an embedding that is a scalar", shaped(embed_tokens=[]), "expected a matrix"),
    Case("an embedding without rows", shaped(embed_tokens=[0, 8]), "expected a matrix"),
    Case("an embedding without columns", shaped(embed_tokens=[32, 0]), "expected a matrix"),
    Case("an embedding of three dimensions", shaped(embed_tokens=[32, 8, 1]), "expected a matrix"),
    Case("a head that is a vector", shaped(lm_head=[32]), "tensor 'lm_head.weight'"),
    Case("an embedding of whole numbers", then(without("embed_tokens.weight"), added(EMBEDDING, "I32", [32, 8], 1024)), "expected a matrix of floating-point"),
    Case("a layer too few", without(*SECOND), "one run of 2 decoder layers, found model.layers.* × 1", 3),
    Case("no layers at all", without(*(name for name in SHAPES if ".layers." in name)), "found none", 3),
    Case("layers without a matrix", without("proj.weight"), "no linear weight", 3),
    Case("layers without elements", shaped(**NOTHING), "no linear weight", 3),
    Case("layers of whole numbers", shaped("I8", 1), "floating-point", 1),
    Case("a layer of another shape", shaped(**{"1__self_attn__q_proj": [4, 8]}), "layer 1: self_attn.q_proj: expected shape (8, 8)", 3),
    Case("a layer with a matrix less", without(Q), "layer 1: self_attn.q_proj", 3),
    Case("a layer number of 5000 digits", then(without(Q), DIGITS), "layer 1: self_attn.q_proj", 3),
    Case("half a megabyte of digits", then(without(Q), added("1" * 500000, "F32", [8, 8], 256)), "layer 1: self_attn.q_proj", 3),
    Case("layers that are numbered wrong", then(without(*SECOND), added("model.layers.7.w.weight", "F32", [8, 8], 256)), "layer model.layers.1 has no tensor"),
    Case("200 lists of layers", LISTS, "and 196 more", 3),
]  # fmt: skip

CASES = [
    (group, case)
    for group, cases in {
        "file": FILES,
        "header": HEADERS,
        "index": INDICES,
        "folder": FOLDERS,
        "config": CONFIGS,
        "tensor": TENSORS,
    }.items()
    for case in cases
]

#: Strange, and nothing is wrong with it: `pkt inspect` must end with 0.
SOUND = {
    "as it is": lambda model: None,
    "in two shards": split,
    "a tensor of no elements beside the layers": added("extra", "F32", [0, 5], 0),
    "a scalar beside the layers": added("extra", "F32", [], 4),
    "whole numbers beside the layers": added("extra", "I64", [2], 16),
    "a tensor in two shards": lambda model: then(
        split, lambda m: m.shards.update({"1.safetensors": Shard.of({n: s for n, s in SHAPES.items() if n == Q or ".layers.0." in n})})
    )(model),
    "a padded header": lambda m: header(json.dumps(m.only.header) + " " * 1000)(m),
    "metadata of strange texts": lambda m: m.only.header.update({"__metadata__": {"": "\x1b[2J"}}),
    "code of its own that nobody runs": config(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
    "a link inside the folder": then(
        last=lambda f: ((f / FILE).rename(f / "real.safetensors"), (f / FILE).symlink_to("real.safetensors"))
    ),
    "no kv heads": config(num_key_value_heads=None),
}  # fmt: skip
