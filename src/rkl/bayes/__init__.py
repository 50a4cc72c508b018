"""Bayes point estimates under any divergence, from any posterior."""
