"""Folders on the disk: those that appear whole or not at all, and those that hold a model."""
