"""Helpers without knowledge of models or data."""


def disable_torch_init() -> None:
    """Do nothing; kept for published snippets.

    Loading already skips the initialization of weights that are replaced.
    """
