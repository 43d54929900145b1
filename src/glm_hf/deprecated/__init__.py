"""Names of glm_hf 0.1 that go with 0.3; everything in this folder can be deleted then."""
