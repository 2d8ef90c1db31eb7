"""The static leaderboard: views are pure functions of rows, templates turn them into pages."""
