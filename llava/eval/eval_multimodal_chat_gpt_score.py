"""Score the answers of a chat evaluation with a judge; both published spellings of the options work.

python llava/eval/eval_multimodal_chat_gpt_score.py --question_input_path questions.jsonl --input_path answers.jsonl \\
    --output_path scores.jsonl
python llava/eval/eval_multimodal_chat_gpt_score.py --question-file questions.jsonl --answers-file answers.jsonl \\
    --scores-file scores.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.judge import cli
from llava.utils.cli import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.score_main(argv)


if __name__ == "__main__":
    run_program(main)
