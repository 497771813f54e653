"""The exported Hugging Face model.

The files ``*_moiie.py`` are copied into every exported directory and run there without this
package: they import torch, transformers, PIL and each other, nothing else.
"""
