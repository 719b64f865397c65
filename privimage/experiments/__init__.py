"""Many runs as one file: combinations of settings, each with several seeds, and their table."""
