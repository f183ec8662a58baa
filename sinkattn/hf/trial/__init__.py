"""The trial of `enable`: the patched model must agree with the original in every layer (trial, original, agreement)."""
