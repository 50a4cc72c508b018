"""Language models: read, cut, adapted, shared among processes, or made new."""
