"""sinkattn for transformers models; the only part that imports transformers."""

from sinkattn.hf.cache import SinkCache
from sinkattn.hf.probe import UnsupportedModelError
from sinkattn.hf.stream import stream_text, stream_tokens
from sinkattn.hf.swap import disable, enable

__all__ = ["SinkCache", "UnsupportedModelError", "disable", "enable", "stream_text", "stream_tokens"]
