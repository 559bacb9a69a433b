"""Conversion between checkpoint layouts."""
