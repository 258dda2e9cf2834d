"""Hooks of mkdocs: the page of options is what the commands print; the images of the repository are on the site."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- options -->"


def help_of(name: str) -> str:
    """Return the help of a command, 100 characters wide."""
    from llava.cli import COMMANDS
    from llava.utils.cli import run_target

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run_target(COMMANDS[name].target, ["--help", *([] if name == "train" else ["all"])])
    return text.getvalue().strip()


def options_page() -> str:
    """Return a section for each command: summary, example and help."""
    from llava.cli import COMMANDS

    return "\n\n".join(
        f"## llava {name}\n\n{command.summary}\n\n```text\n{command.example}\n\n{help_of(name)}\n```"
        for name, command in COMMANDS.items()
    )


def on_files(files: Files, config: Any) -> Files:
    """Add the images of the repository to the site."""
    from mkdocs.structure.files import File

    for image in sorted((ROOT / "images").iterdir()):
        files.append(File(f"images/{image.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the page of options; images are one folder less far away than in the repository."""
    markdown = markdown.replace("](../images/", "](images/")
    if MARK not in markdown:
        return markdown
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = "102"  # the width of argparse
    return markdown.replace(MARK, options_page())
