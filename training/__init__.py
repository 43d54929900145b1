"""Blank-infilling training: data, schedules and trainers."""
