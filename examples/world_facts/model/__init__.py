"""A small bilingual model that knows some facts of the world; `examples/world_facts/make.py` makes it."""
