"""The `llava` command as `python -m llava`, where its console script is not on the path."""

from llava.utils.cli import run_target

if __name__ == "__main__":
    run_target("llava.cli:main", None)
