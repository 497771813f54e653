"""Weights from Hugging Face, upcycling, and distributed checkpoints."""
