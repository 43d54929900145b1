"""Evaluation: the original's tasks with its scores, and a model class of lm-evaluation-harness.

Needs `pip install "glm_hf[evaluate]"` for the harness; the original's task files need nothing more.
"""
