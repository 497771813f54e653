"""Plots of routing records."""
