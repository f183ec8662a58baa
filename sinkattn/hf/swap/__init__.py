"""The patch of an enabled model: what all models share (stream_patch), and attention over rings (ring_patch)."""
