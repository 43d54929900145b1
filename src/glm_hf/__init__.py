"""GLM-130B as a first-class Hugging Face model."""
