"""The trial of `enable`: the attention of the patched model must agree with the original's in every layer."""
