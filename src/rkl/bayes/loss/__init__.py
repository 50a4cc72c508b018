"""The loss between distributions, and its expectation over the posterior."""
