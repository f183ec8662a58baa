"""sinkattn for transformers models; nothing below it imports transformers."""

from sinkattn.hf.api import decode_steps, disable, enable
from sinkattn.hf.background import BackgroundLearner
from sinkattn.hf.cache.load_stream import load_stream
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.learner import OnlineLearner
from sinkattn.hf.pool.joining import join_pool
from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.scheduler import PoolFullError
from sinkattn.hf.pool.speculation import DraftModel, PromptLookup
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.stream import stream_text, stream_tokens
from sinkattn.hf.unsupported import UnsupportedModelError

__all__ = [
    "BackgroundLearner",
    "DraftModel",
    "OnlineLearner",
    "PoolFullError",
    "PromptLookup",
    "SamplingParams",
    "SinkCache",
    "Stream",
    "StreamPool",
    "UnsupportedModelError",
    "decode_steps",
    "disable",
    "enable",
    "join_pool",
    "load_stream",
    "stream_text",
    "stream_tokens",
]
