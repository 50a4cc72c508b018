"""Measures of how near a model is to its target: tensors in, values with their errors out."""
