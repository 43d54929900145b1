"""An OpenAI-compatible server of one model, and its page; needs `pip install "glm_hf[serve]"`."""
