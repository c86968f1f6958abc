"""Compiled and captured steps, and which way of taking VJPs is the fastest."""
