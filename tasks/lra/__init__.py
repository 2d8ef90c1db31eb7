"""The tasks of Long Range Arena (arXiv 2011.04006), with embedded and generated data at small sizes."""
