"""Linear, low-rank, recurrent and spectral mechanisms."""
