"""Labels of the methods in tables and pictures."""

from __future__ import annotations

from sinkattn.evaluate.methods import Dense, Predictor, Recomputed, Streamed


def label(predictor: Predictor) -> str:
    """The label of a method, with its sizes."""
    if isinstance(predictor, Streamed):
        kept = "sinks + window" if predictor.size.num_sinks else "window alone"
        return f"{predictor.size} {kept}" + (f", {predictor.cache_dtype}" if predictor.cache_dtype else "")
    if isinstance(predictor, Recomputed):
        return f"{predictor.size} tokens, recomputed"
    return "dense, cache grows" if isinstance(predictor, Dense) else "one question at a time"
