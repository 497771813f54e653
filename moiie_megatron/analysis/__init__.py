"""From statistics to pictures."""
