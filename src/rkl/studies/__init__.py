"""One module per paper, its claims tested; and the demonstrations."""
