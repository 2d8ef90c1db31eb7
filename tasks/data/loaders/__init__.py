"""Readers of the published data sets, one module for a kind of data; found through ``tasks.data.sources``."""
