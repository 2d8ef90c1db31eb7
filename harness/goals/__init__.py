"""Our kernels against the best of others, in turns in one process, and whether each goal is met.

What ``make gpu`` runs: one call of known length on a GPU, which leaves rows and a report whatever happens.
"""
