"""Measurements of a trained model: answers and scores, logits, routing, layout equivalence."""
