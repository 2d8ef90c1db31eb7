"""Cross-attention, latent, slot and pooling mechanisms."""
