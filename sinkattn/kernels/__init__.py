"""Attention in Triton, for CUDA tensors. Imported by the first call that needs it."""
