"""Attention in Triton, for CUDA tensors. Imported when the first of them comes."""
