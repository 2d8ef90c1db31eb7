"""The tasks of CAB (arXiv 2210.07661)."""
