"""What a mechanism could reach on a GPU that is not here, by formula: modelled, never measured.

Nothing here is a row of results: the leaderboard shows what ran.
"""
