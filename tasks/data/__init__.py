"""Data of the tasks: embedded real text, generated data, loaders of real data sets."""
