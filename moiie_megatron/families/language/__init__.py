"""Families of language models, one file each; ``config/families.py`` lists them."""
