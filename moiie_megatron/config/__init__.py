"""What a run is: typed values, their YAML form, and the conditions that join them."""
