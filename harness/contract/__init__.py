"""The contract kit: what every mechanism must hold, checked for ours and for a user's own."""
