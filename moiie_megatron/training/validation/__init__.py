"""The loss on held-out samples (``data.validation``), while a run trains and afterwards."""
