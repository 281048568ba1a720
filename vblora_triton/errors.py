"""What the command says in one line before it exits with 2."""


class InputError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and what would work."""
