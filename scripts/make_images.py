"""Make the files of `images/` from real output: `python scripts/make_images.py`.

    llava data show (colored)         --> images/data-show.svg
    layers of docs/architecture.md    --> images/architecture.svg
    a table of docs/performance.md    --> images/speed.svg
    --evaluation PAGE, in Chromium    --> images/evaluation.png

The page of an evaluation is that of `llava eval` or of the quickstart; without the option that image is left as it is.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "images"
ROW = {
    "id": "example-0",
    "image": "xray.png",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a pleural effusion?"},
        {"from": "gpt", "value": "Yes, a small one on the left."},
        {"from": "human", "value": "Is the heart enlarged?"},
        {"from": "gpt", "value": "No."},
    ],
}
"""The row of `data-show.svg`, made up."""

ANSI = re.compile(r"\x1b\[([\d;]*)m")
STYLES = {"1;32": "fill:#4ade80;font-weight:bold", "1;34": "fill:#60a5fa;font-weight:bold",
          "9;31": "fill:#f87171;text-decoration:line-through"}  # fmt: skip
"""Colors of `llava data show` on a terminal, and here."""

WIDTH = 960
FONT = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px"
SANS = "font-family:system-ui,sans-serif"
COLUMNS = 112


def svg(height: float, body: Iterable[str], *, background: str = "#ffffff") -> str:
    """Return an SVG file of `WIDTH` with a background, so that it is readable on light and dark pages."""
    frame = f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{background}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">'
    return "\n".join([head, frame, *body, "</svg>"]) + "\n"


def terminal_svg(command: str, output: str) -> str:
    """Return a terminal with a command and its colored output."""
    lines = [f"$ {command}", *wrapped(output.rstrip("\n").split("\n"))]
    body = []
    style = ""
    for number, line in enumerate(lines):
        spans, style = colored_spans(line, style)
        body.append(
            f'<text x="16" y="{28 + 19 * number}" xml:space="preserve" style="{FONT};fill:#e5e7eb">{spans}</text>'
        )
    return svg(40 + 19 * len(lines), body, background="#111827")


def wrapped(lines: Sequence[str]) -> list[str]:
    """Return lines of at most `COLUMNS` visible characters."""
    found = []
    for line in lines:
        current, width = "", 0
        for part in re.split(r"(\x1b\[[\d;]*m)", line):
            if ANSI.fullmatch(part):
                current += part
                continue
            for character in part:
                if width == COLUMNS:
                    found.append(current)
                    current, width = "", 0
                current, width = current + character, width + 1
        found.append(current)
    return found


def colored_spans(line: str, style: str) -> tuple[str, str]:
    """Return the spans of a line that begins in a style, and the style at its end."""
    spans, last = [], 0
    for match in [*ANSI.finditer(line), None]:
        text = line[last : match.start() if match else len(line)]
        if text:
            spans.append(f'<tspan style="{style}">{escape(text)}</tspan>' if style else escape(text))
        if match:
            style, last = STYLES.get(match[1], ""), match.end()
    return "".join(spans), style


def shown_row() -> str:
    """Return the colored output of `llava data show` for `ROW`, with the tokenizer of SmolLM2."""
    from transformers import AutoTokenizer

    from llava.constants import IMAGE_TOKEN
    from llava.data.show import make_view, to_terminal
    from llava.model.packaged.pretrained import language_model
    from llava.processing import LlavaMedProcessor
    from llava.samples import from_row

    tokenizer = AutoTokenizer.from_pretrained(language_model())
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    processor = LlavaMedProcessor(tokenizer, None, template="chatml", num_image_tokens=64)
    return to_terminal(make_view(from_row(ROW), processor, max_length=None), processor, color=True)


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading of a document, without its first two lines.

    Raises:
        SystemExit: the document has no such table.
    """
    if heading not in text:
        raise SystemExit(f"no {heading!r} in the document; correct the heading in this script")
    lines = iter(text[text.index(heading) :].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def speed_svg(document: str) -> str:
    """Return bars of the seconds for 16 sequences in training, from docs/performance.md."""
    rows = table_rows(document, "**8 questions per image**")
    times = [(name, float(seconds)) for name, _, seconds, _ in rows]
    most = max(seconds for _, seconds in times)
    body = [f'<text x="16" y="32" style="{SANS};font-size:17px;font-weight:600;fill:#111827">'
            "Seconds to train 16 sequences, 8 questions per image (less is better)</text>"]  # fmt: skip
    for number, (name, seconds) in enumerate(times):
        y = 56 + 44 * number
        color = "#2563eb" if name.startswith("ours") else "#9ca3af"
        length = 520 * seconds / most
        body += [
            f'<text x="16" y="{y + 20}" style="{SANS};font-size:13px;fill:#111827">{escape(name)}</text>',
            f'<rect x="360" y="{y}" width="{length:.1f}" height="28" rx="4" fill="{color}"/>',
            f'<text x="{370 + length:.1f}" y="{y + 20}" style="{SANS};font-size:13px">{seconds:g} s</text>',
        ]
    note = "24M parameters, two cores of an AMD EPYC (Zen 5), float32; losses equal. docs/performance.md"
    y = 56 + 44 * len(times) + 18
    body.append(f'<text x="16" y="{y}" style="{SANS};font-size:12px;fill:#6b7280">{note}</text>')
    return svg(y + 16, body)


def architecture_svg(document: str) -> str:
    """Return the layers of the package, highest first, from the table of docs/architecture.md."""
    rows = [(level, re.findall(r"`(\w+)`", parts)) for level, parts, _ in table_rows(document, "## Layers")]
    body = [f'<text x="16" y="32" style="{SANS};font-size:17px;font-weight:600;fill:#111827">'
            "Layers: a part imports those below it only</text>"]  # fmt: skip
    y = 52
    for level, parts in reversed(rows):
        lines = [parts[start : start + 7] for start in range(0, len(parts), 7)]
        height = 34 * len(lines) + 12
        body.append(f'<rect x="16" y="{y}" width="{WIDTH - 32}" height="{height}" rx="6" fill="#f3f4f6"/>')
        body.append(f'<text x="30" y="{y + 27}" style="{SANS};font-size:13px;fill:#6b7280">{escape(level)}</text>')
        for line_number, line in enumerate(lines):
            for place, part in enumerate(line):
                x, top = 64 + 124 * place, y + 8 + 34 * line_number
                body.append(f'<rect x="{x}" y="{top}" width="116" height="28" rx="5" fill="#dbeafe"/>')
                body.append(
                    f'<text x="{x + 58}" y="{top + 18}" text-anchor="middle" style="{FONT};font-size:11px">'
                    f"{escape(part)}</text>"
                )
        y += height + 8
    return svg(y + 8, body)


def page_png(page: Path, *, height: int = 1780) -> bytes:
    """Return the top of a page in Chromium, as a PNG file of 256 colors.

    Raises:
        SystemExit: Chromium is not installed.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("Chromium is not installed; the image of the evaluation page needs it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={file}"]
        words = [program, *options, f"--window-size=1280,{height}", f"--user-data-dir={folder}/profile", page.as_uri()]
        subprocess.run(words, check=True, capture_output=True, timeout=300)
        shot = Image.open(file).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    shot.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=Path, help="report.html of an evaluation")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    show = terminal_svg("llava data show train.json --model smollm2 --version chatml", shown_row())
    files = {
        "data-show.svg": show,
        "architecture.svg": architecture_svg((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")),
        "speed.svg": speed_svg((ROOT / "docs" / "performance.md").read_text(encoding="utf-8")),
    }
    for name, text in files.items():
        (IMAGES / name).write_text(text, encoding="utf-8")
    if args.evaluation is not None:
        (IMAGES / "evaluation.png").write_bytes(page_png(args.evaluation.resolve()))


if __name__ == "__main__":
    main()
