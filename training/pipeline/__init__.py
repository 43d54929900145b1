"""3D-parallel training on DeepSpeed's pipeline engine."""
