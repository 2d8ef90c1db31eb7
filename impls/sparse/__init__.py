"""Mechanisms that attend to a static or selected subset of the keys."""
