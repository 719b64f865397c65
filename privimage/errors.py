"""The three ways in which a run ends early, each with its exit status."""


class UserError(Exception):
    """A mistake in the configuration or the input, told in one line that names the key or the file (exit status 2)."""


class Stopped(Exception):
    """A stop was requested and the state is saved; running again goes on from there (exit status 75)."""
