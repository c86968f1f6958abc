"""The losses that :mod:`fastmtl.loss` offers, by subject."""
