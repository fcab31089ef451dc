"""`pkt env`: versions, host, memory limit, processor features, aliases; for bug reports too."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

import pkt
from pkt.cli import options
from pkt.cli.environment import alias_file, aliases
from pkt.cli.tables import aligned
from pkt.config import format_bytes
from pkt.host import describe, memory_limit, multiplies_bfloat16

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
_VECTORS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


@click.command(short_help="Versions, host, memory limit, aliases.")
@options.as_json
def env(as_json: bool) -> None:
    """Show versions, the host, its memory limit, and the table of aliases."""
    limit, source = memory_limit()
    path, table = alias_file(), aliases()
    found: dict[str, Any] = {
        "pkt": pkt.__version__,
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": _cuda(),
        "host": describe(),
        "features": _features(),
        "bfloat16_products": "bfloat16" if multiplies_bfloat16() else "float32",
        "memory_limit_bytes": limit,
        "memory_limit_source": source,
        "alias_file": str(path),
        "alias_file_exists": path.is_file(),
        "aliases": dict(table),
    }
    click.echo(json.dumps(found, indent=1) if as_json else _text(found))


def _text(found: dict[str, Any]) -> str:
    host = found["host"]
    absent = "" if found["alias_file_exists"] else " (not there yet)"
    rows = [
        ("pkt", found["pkt"]),
        ("python", host["python"]),
        *found["versions"].items(),
        ("cuda", found["cuda"] or "none"),
        ("processor", f"{host['processor']}, {host['cores']} cores"),
        ("features", " ".join(found["features"]) or "none known"),
        ("bfloat16", f"multiplied in {found['bfloat16_products']}"),
        ("system", host["system"]),
        ("memory", format_bytes(host["memory_bytes"])),
        ("limit", f"{format_bytes(found['memory_limit_bytes'])}, {found['memory_limit_source']}"),
        ("aliases", found["alias_file"] + absent),
    ]
    return aligned(rows) + "\n" + aligned(list(found["aliases"].items()), indent=2)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _cuda() -> str | None:
    """The CUDA version torch was built for, and the devices it finds."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _features() -> list[str]:
    """Processor features that the kernels or torch use, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    known = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return [name for name in _VECTORS if name in known]
