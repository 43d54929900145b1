"""The tasks of the evaluation that was released with GLM-130B: its files, its rules, its metrics."""
