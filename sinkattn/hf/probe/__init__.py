"""The probe: run a model to find out how each attention layer masks and rotates."""
