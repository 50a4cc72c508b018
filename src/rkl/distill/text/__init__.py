"""Rows from anywhere, as blocks of tokens and batches."""
