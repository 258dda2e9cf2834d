"""Write the findings of chest X-rays.

python -m llava.eval.model_mimic_cxr --query_file chat_test.json --loader mimic_test_findings --image_folder files \\
    --model_path microsoft/llava-rad --model_base lmsys/vicuna-7b-v1.5 --conv_mode v1 --prediction_file test.jsonl
python -m llava.eval.model_mimic_cxr join --folder results --num_chunks 2 --out results/mimic_cxr_preds.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.eval import findings_run
from llava.utils.cli import run_program

JOIN = "join"
"""First argument of the command that joins chunks."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [JOIN]:
        findings_run.join_main(words[1:])
    else:
        findings_run.run_findings(findings_run.make_parser().parse_args(words))


if __name__ == "__main__":
    run_program(main)
