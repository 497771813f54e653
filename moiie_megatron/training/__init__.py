"""Stages, optimizer, step, loop and metrics."""
