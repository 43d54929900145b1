"""Texts tokenized by several processes into one corpus."""
