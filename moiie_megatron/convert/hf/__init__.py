"""Files of Hugging Face directories."""
