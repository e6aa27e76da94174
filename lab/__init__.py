"""Questions to finished runs: the rooms behind eval.py, and what they share (runs, timing, pictures, sizes)."""
