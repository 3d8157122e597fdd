"""Whole clusters, started as a user starts them and spoken to as a user speaks to them."""
