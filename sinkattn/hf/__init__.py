"""sinkattn for transformers models; the only part that imports transformers."""

from sinkattn.hf.admission import disable, enable
from sinkattn.hf.cache import SinkCache
from sinkattn.hf.probe import UnsupportedModelError
from sinkattn.hf.stream import stream_text, stream_tokens

__all__ = ["SinkCache", "UnsupportedModelError", "disable", "enable", "stream_text", "stream_tokens"]
