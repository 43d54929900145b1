"""What a run logs: measured while it trains, written to a file, and drawn as curves."""
