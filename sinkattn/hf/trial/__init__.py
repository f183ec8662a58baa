"""The trial of `enable`: the attention of the swapped model must agree with the original's in every layer."""
