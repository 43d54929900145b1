"""How weights are distributed, and what quantizing them loses."""

from glm_hf.conversion.analysis.report import analyze_weights, describe_analysis, write_analysis

__all__ = ["analyze_weights", "describe_analysis", "write_analysis"]
