"""Small pieces that every other package may use."""
