"""The metrics that :mod:`fastmtl.metrics` offers, by subject."""
