"""Helpers that all packages may use."""
