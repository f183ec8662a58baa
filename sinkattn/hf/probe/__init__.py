"""The probe: what a model's attention layers do, found by running them (probe, recording, masks, rotations, result)."""
