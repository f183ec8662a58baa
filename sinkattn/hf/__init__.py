"""sinkattn for transformers models; nothing below it imports transformers."""

from sinkattn.hf.api import disable, enable
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.stream import stream_text, stream_tokens
from sinkattn.hf.unsupported import UnsupportedModelError

__all__ = ["SinkCache", "UnsupportedModelError", "disable", "enable", "stream_text", "stream_tokens"]
