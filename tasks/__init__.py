"""Training-and-evaluation problems with a metric, and the shapes of real models."""
