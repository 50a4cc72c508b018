"""Whatever a student may learn from."""
