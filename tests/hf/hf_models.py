"""Models that most tests of `sinkattn.hf` run on: a few of `families`, some of them in a variation."""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import families
import pytest
import torch
from families import SIZES, VOCABULARY, build_model, random_ids

import sinkattn

__all__ = [
    "ABSOLUTE",
    "ROTARY",
    "SIZES",
    "VOCABULARY",
    "build",
    "build_model",
    "enabled",
    "interrupted",
    "random_ids",
    "tensors_of",
]

ROTARY = ("llama", "llama-yarn", "llama-llama3", "mistral", "qwen2", "qwen3", "gpt_neox")
# Positions are added to the embeddings: these stream by re-encoding.
ABSOLUTE = ("gpt2", "opt", "gpt_bigcode", "biogpt", "gpt_neo", "xglm")
VARIATIONS = {
    "llama-llama3": {"rope_parameters": {**families.LLAMA3["rope_parameters"], "factor": 8.0}},
    "opt": {"word_embed_proj_dim": 16},  # narrower than the hidden states
    "gpt_neo": {"window_size": 9},
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """Model of a family, in its variation if it has one here."""
    return families.build(family, dtype, seed, **{**VARIATIONS.get(family, {}), **overrides})


@cache
def enabled(family: str, num_sinks: int, window: int, headroom: int = 0):
    """An enabled model that tests share, because `enable` takes long: do not change it, nor leave hooks in it."""
    return sinkattn.enable(build(family), num_sinks, window, headroom)


def tensors_of(cache) -> list[torch.Tensor]:
    """All tensors reachable from a cache."""
    found = []

    class Finder(pickle.Pickler):
        def persistent_id(self, x):
            if isinstance(x, torch.Tensor):
                found.append(x)
            return "tensor" if isinstance(x, torch.Tensor) else None

    Finder(io.BytesIO()).dump(cache)
    return found


@contextmanager
def interrupted(block: torch.nn.Module, runs: int, error: type[BaseException]) -> Iterator[None]:
    """Expect ``error``: it is raised within when ``block`` of the model is called after so many ``runs``."""

    def interrupt(*args):
        nonlocal runs
        runs -= 1
        if runs < 0:
            raise error("stop")

    handle = block.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(error, match="stop"):
            yield
    finally:
        handle.remove()
