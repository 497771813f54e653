"""What a step waits for: links, and what hides behind the computation."""
