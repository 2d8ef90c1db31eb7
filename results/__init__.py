"""Results: the schema of a row, its journal and Parquet forms, statistics and scores. Imports no torch."""
