"""Evaluates the checkpoints of a run while it trains, or after it has ended."""
