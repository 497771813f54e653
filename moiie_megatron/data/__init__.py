"""From LLaVA records and an image folder to ``Batch``: one sample stream for every layout."""
