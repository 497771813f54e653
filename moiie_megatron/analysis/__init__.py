"""Figures, tables and an HTML report from the logs of runs."""
