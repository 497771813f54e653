"""What a run costs before it is started: arithmetic on its configuration."""
