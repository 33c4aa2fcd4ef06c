"""Single decisions as pure functions, one per file; time is an argument."""
