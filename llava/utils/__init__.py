"""Helpers without knowledge of models or data."""


def disable_torch_init() -> None:
    """Do nothing: models are loaded without initializing weights that are replaced; kept for published snippets."""
