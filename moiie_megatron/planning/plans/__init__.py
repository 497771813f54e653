"""The plan of one layout: what its ranks hold, send and compute, and its report."""
