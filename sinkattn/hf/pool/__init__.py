"""`StreamPool`: many endless streams of one model, batched."""
