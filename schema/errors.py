"""What a user got wrong, said in one line."""


class ConfigError(ValueError):
    """Wrong input of a user: entry points print it as one line and exit with code 2.

    The message names the key, the value given and what is allowed.
    """
