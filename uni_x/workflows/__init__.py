"""Chains of the other packages, with nothing of their own."""
