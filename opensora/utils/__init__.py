"""Open-Sora's names for things that live elsewhere."""
