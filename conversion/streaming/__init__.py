"""Tensors read and written block by block, in runs that can be resumed."""
