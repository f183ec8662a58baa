"""`load_stream`: a cache from a file of `SinkCache.save`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from sinkattn.argument_checks import check_path
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.cache.stream_file import SavedStreams, read_streams
from sinkattn.hf.dry_run import without_dropout
from sinkattn.hf.fingerprint import Accepted, check_fingerprint
from sinkattn.hf.model_patch import ModelPatch, require_patch
from sinkattn.hf.versions import forward_cache


def load_stream(model: nn.Module, path: str | Path, *, accept: Collection[Accepted] = ()) -> SinkCache:
    """Load the streams that `SinkCache.save` has saved, into a new cache of this model, on its device.

    Streams go on bit for bit as if they had never been saved, if the machine and the versions of torch and transformers
    are the same. Nothing in a file is executed, and no more memory allocated than its streams need. The model's decoder
    runs once, for one token in a cache of its own, which shows what its caches are made of; call this under the same
    ``torch.autocast`` as the model.

    Args:
        model: enabled by `sinkattn.enable` with the layout that it had, and with the same weights, of which a sample is
            compared (`sinkattn.hf.fingerprint`).
        path: the file.
        accept: "dtype": the model may be in another dtype; keys, values and states are converted. "weights": its
            weights may be others, as after more steps of an `OnlineLearner`; streams go on with the keys and values
            that earlier weights have made.

    Raises:
        ValueError: a model that is not enabled; a file that is no file of saved streams, is damaged, or is not for this
            model: the message names the field that differs. The model is left as it was.
        OSError: the file cannot be read.
    """
    patch = require_patch(model)
    saved = read_saved(patch, path, accept)
    saved.split("pool")
    cache = load_cache(patch, saved)
    saved.check_all_taken()
    return cache


def read_saved(patch: ModelPatch, path: str | Path, accept: Collection[Accepted]) -> SavedStreams:
    """Read a file, and check that it is of this model; raises as `load_stream`."""
    check_path("path", path)
    saved = read_streams(path)
    check_fingerprint(patch, saved.model, accept)
    saved.converts_dtype = "dtype" in accept
    return saved


def load_cache(patch: ModelPatch, saved: SavedStreams) -> SinkCache:
    """The cache that was saved; raises as `load_stream`."""
    try:
        # Not inference tensors: the streams may go on outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            num_sinks = saved.count("num_sinks")
            if saved.count("num_columns") and num_sinks > saved.num_elements:
                raise ValueError(f"num_sinks: expected as many as the file has slots, got {num_sinks}")
            cache = SinkCache(patch.model, num_sinks=num_sinks)
            if saved.count("num_columns"):
                _allocate(patch, cache)
            cache.load_state(saved)
    except ValueError as error:
        raise ValueError(f"path: {str(error).removeprefix('path: ')}") from error
    return cache


def _allocate(patch: ModelPatch, cache: SinkCache) -> None:
    """Let the model allocate the memory of one row in a new cache."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=patch.model.device)
    with without_dropout(patch.decoder):
        patch.decoder(input_ids=ids, **{forward_cache(patch.decoder): cache})
