"""`SinkCache`: rings behind transformers' `Cache` interface (sink_cache, layers) and their state (state)."""
