"""llava: train, evaluate and serve medical vision-language assistants."""

__version__ = "0.1.0"
