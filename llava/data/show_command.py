"""Command `llava data show`; torch is imported after the options are parsed.

Example::

    llava data show FILE --row N --model M
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.data.mixture import is_mixture
from llava.errors import ConfigError
from llava.utils.cli import Parser, check_folder
from llava.utils.plugins import add_plugin_option


def make_parser() -> Parser:
    """Return the parser of `llava data show`."""
    parser = Parser(
        prog="llava data show",
        description="Show one row of a data file as the model sees it: text, trained tokens, images and truncation.",
    )
    parser.add_argument("file", help="data file: JSON or JSON lines")
    parser.add_argument("--row", type=int, default=0, help="number of the row, from 0")
    parser.add_argument("--model", required=True, help="trained model, or a language model's folder or hub name")
    parser.add_argument("--html", help="also write an HTML page to this file")
    parser.add_argument("--image_folder", help="folder of the images of the row, which the page shows")
    parser.add_argument("--max_length", type=int, help="truncate as training with this --model-max-length does")
    parser.add_argument("--version", default="vicuna_v1", help="template, for a model without a processor")
    parser.add_argument(
        "--num_image_tokens", type=int, default=256, help="tokens per image, for a model without a processor"
    )
    parser.add_switch(
        "--mm_use_im_start_end", help="put start and end tokens around images, for a model without a processor"
    )
    asked = parser.add_argument_group("questions that the model learns to ask")
    asked.add_argument("--sq-r", type=float, help="draw them as training with this --sq-r does")
    asked.add_argument("--seed", type=int, default=42, help="seed of that training")
    asked.add_argument("--epoch", type=int, default=0, help="epoch of that training, from 0")
    add_plugin_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Show one row of a data file."""
    args = make_parser().parse_args(argv)
    check_folder(args.image_folder, "--image-folder")
    if is_mixture(args.file):
        raise ConfigError(
            f"{args.file} is a mixture, expected a data file; pass the file of one source, or the output of "
            "`llava data mix`"
        )
    from llava.data.show import show  # takes seconds, for which --help does not wait

    show(args)
