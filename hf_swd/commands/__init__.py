"""What the console script `hf-swd` does."""
