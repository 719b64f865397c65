"""Many runs as one file: combinations of settings, each with several seeds, and the table of what they gave."""
