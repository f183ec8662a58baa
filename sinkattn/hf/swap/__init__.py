"""Patches of enabled models: argument checks of all (stream_patch), and attention over rings (ring_patch)."""
