"""How weights are distributed, and what quantizing them loses."""
