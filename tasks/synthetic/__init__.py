"""Tasks with a theory to compare with: in-context regression, memory capacity, compositional questions."""
