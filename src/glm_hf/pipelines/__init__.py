"""Pipelines of transformers that fill blanks and continue prompts."""
