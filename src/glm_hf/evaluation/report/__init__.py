"""What an evaluation has found: figures in a table, beside published ones, beside another's, and as a picture."""
