"""A small real data set: questions over scanned digits."""
