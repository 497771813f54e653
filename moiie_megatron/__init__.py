"""MoIIE-Megatron: training of MoIIE, a sparse vision-language model, on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
