"""A small real data set without downloads: questions about pictures of scanned digits."""
