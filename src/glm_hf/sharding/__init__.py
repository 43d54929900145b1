"""How tensors are sharded over ranks, and ranks arranged."""
