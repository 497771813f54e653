"""Counts, lengths and unusable records of a data set, before a run."""
