"""Hugging Face models to Megatron checkpoints, and back."""
