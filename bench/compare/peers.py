"""Who is compared: each peer's script, environment, weights and options."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Peer:
    """One row of the comparison.

    Attributes:
        name: name of the row.
        script: its runner in this folder.
        weights: what its weights are given as: "folder" (of transformers, float32), "given" (the GGUF file itself), or
            the type of tensors of a GGUF file that is written for it.
        bits: of a weight, by which rows are compared with llama.cpp's; 0 for "given": those of the file.
        dtype: in which a peer on PyTorch loads the folder.
        requirements: file in this folder with the packages of its own environment; None for sinkattn's.
        options: what its script makes of it.
    """

    name: str
    script: str
    weights: str
    bits: int
    dtype: str = "float32"
    requirements: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _sinkattn(name: str, bits: int, dtype: str, quantize: str | None = None, *, compile: bool = False) -> Peer:
    options = {"quantize": quantize, "compile": compile}
    return Peer(f"sinkattn {name}", "run_sinkattn.py", "folder", bits, dtype, options=options)


def _transformers(name: str, bits: int, dtype: str, method: str) -> Peer:
    return Peer(f"transformers {name}", "run_transformers.py", "folder", bits, dtype, options={"method": method})


def _llama_cpp(name: str, weights: str, bits: int, kv: str = "float16") -> Peer:
    return Peer(
        f"llama.cpp {name}", "run_llama_cpp.py", weights, bits, requirements="llama_cpp.txt", options={"kv": kv}
    )


PEERS = [
    _sinkattn("fp32", 32, "float32"),
    _sinkattn("bf16", 16, "bfloat16"),
    _sinkattn("int8", 8, "bfloat16", "int8"),
    _sinkattn("int4", 4, "bfloat16", "int4"),
    _sinkattn("fp32, compiled", 32, "float32", compile=True),
    _sinkattn("bf16, compiled", 16, "bfloat16", compile=True),
    _sinkattn("int8, compiled", 8, "bfloat16", "int8", compile=True),
    _sinkattn("int4, compiled", 4, "bfloat16", "int4", compile=True),
    _transformers("DynamicCache fp32, growing", 32, "float32", "growing"),
    _transformers("DynamicCache fp32, kept at this length", 32, "float32", "kept"),
    _transformers("DynamicCache bf16, kept at this length", 16, "bfloat16", "kept"),
    _transformers("recomputation fp32", 32, "float32", "recomputed"),
    _transformers("recomputation bf16", 16, "bfloat16", "recomputed"),
    Peer("attention_sinks fp32", "run_attention_sinks.py", "folder", 32, requirements="attention_sinks.txt"),
    _llama_cpp("F32", "F32", 32, kv="float32"),
    _llama_cpp("F16", "F16", 16),
    _llama_cpp("BF16", "BF16", 16),
    _llama_cpp("Q8_0", "Q8_0", 8),
    _llama_cpp("as given", "given", 0),
]
