"""Softmax attention and its score, mask and head variants."""
