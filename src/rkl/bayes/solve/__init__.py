"""How a problem is solved: in closed form from one pass over the draws, or numerically."""
