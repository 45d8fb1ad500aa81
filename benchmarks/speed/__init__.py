"""Measurements of speed: ratios within one interleaved run, never absolute times."""
