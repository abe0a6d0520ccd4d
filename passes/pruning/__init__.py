"""Passes that take weights away: zeros in place (``PruneSparse``), and the algorithms they share."""
