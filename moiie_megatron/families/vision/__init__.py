"""Families of vision encoders, one file each; ``config/families.py`` lists them."""
