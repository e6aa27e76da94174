"""The code as assignments: what is to be written (tasks), handouts, grading, and what proves them (check)."""
