"""Benchmark of the report metrics against the packages whose values they have.

    python -m benchmarks.report_metrics                 # 10,000 pairs of real findings
    python -m benchmarks.report_metrics --pairs 2000

Texts are the findings of the Indiana University reports in the package torchxrayvision (`bash scripts/setup.sh rad`),
each with the findings of another report as prediction. The other packages are those of the extra `oracles`. Values are
asserted to be equal. Everything runs on one thread: without OMP_NUM_THREADS=1, OPENBLAS_NUM_THREADS=1 and
RAYON_NUM_THREADS=1 the program starts itself again with them. Slow sides run on fewer pairs or draws, as the output
says, and are compared per pair and per draw. The last line is machine-readable.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import fromstring

import numpy as np

from llava.errors import ConfigError
from llava.eval.reports.figures import Resampler
from llava.eval.reports.label_scores import LabelPair, label_array, label_figures
from llava.eval.reports.overlap import bleu_figures, bleu_stats, rouge_figures
from llava.report_labels import labeler
from llava.report_labels.findings import FINDINGS
from llava.utils.cli import Parser, run_program
from llava.utils.lookup import require

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""Variables that libraries read when they are loaded."""

NUM_PAIRS = 10_000
ROUGE_PAIRS = 2_000
LABEL_DRAWS = 1_000
SLOW_DRAWS = 10
LABELED = 1_000
ROUNDS = 3
CLOSE = 1e-6


def read_findings() -> list[str]:
    """Return the findings of all reports of the package.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        raise ConfigError("torchxrayvision is not installed; run: bash scripts/setup.sh rad")
    texts = []
    with tarfile.open(Path(spec.origin).parent / "data" / "NLMCXR_reports.tgz") as reports:
        for member in reports:
            stream = reports.extractfile(member) if member.name.endswith(".xml") else None
            root = None if stream is None else fromstring(stream.read())
            parts = [] if root is None else [p for p in root.iter("AbstractText") if p.get("Label") == "FINDINGS"]
            text = " ".join(" ".join("".join(part.itertext()) for part in parts).split())
            if text:
                texts.append(text)
    return texts


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the shortest time of several runs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def rouge_ratio(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return how much faster ROUGE-L and ROUGE-2 are than those of rouge-score, per pair."""
    scorer = require("rouge_score.rouge_scorer", "oracles").RougeScorer(["rougeL", "rouge2"])
    few = list(zip(predictions, references, strict=True))[:ROUGE_PAIRS]
    start = time.perf_counter()
    expected = [scorer.score(reference, prediction) for prediction, reference in few]
    slow = (time.perf_counter() - start) / len(few)
    figures = rouge_figures(["ROUGE-L", "ROUGE-2"], predictions, references)
    for figure, key in zip(figures, ("rougeL", "rouge2"), strict=True):
        values = [row[key].fmeasure for row in expected]
        assert np.allclose(figure.stats[: len(few), 0], values, atol=CLOSE, rtol=0)
    fast = seconds(lambda: rouge_figures(["ROUGE-L", "ROUGE-2"], predictions, references)) / len(predictions)
    say(f"ROUGE-L and ROUGE-2: {fast * 1e6:.1f} us a pair, rouge-score {slow * 1e6:.1f} ({len(few)} pairs)")
    return slow / fast


def bleu_ratio(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return how much faster BLEU-1 to BLEU-4 with 500 draws are than sacrebleu's BLEU-1 and BLEU-4."""
    module = require("sacrebleu.metrics.bleu", "rad")

    def library() -> list[object]:
        scores = []
        for order in (1, 4):
            metric = module.BLEU(max_ngram_order=order)
            scores.append(metric.corpus_score(list(predictions), [list(references)], n_bootstrap=500))
        return scores

    def ours() -> list[dict[str, float]]:
        resampler = Resampler(range(len(predictions)))
        figures = bleu_figures([f"BLEU-{order}" for order in (1, 2, 3, 4)], bleu_stats(predictions, references))
        return [resampler.estimate(figure) for figure in figures]

    start = time.perf_counter()
    expected = library()
    slow = time.perf_counter() - start
    found = ours()
    for score, facts in zip(expected, (found[0], found[3]), strict=True):
        assert abs(score.score - facts["value"]) < CLOSE  # type: ignore[attr-defined]
        assert abs(score._mean - score._ci - facts["ci_l"]) < 1e-4  # type: ignore[attr-defined]  # sums in float32
    fast = seconds(ours, 2)
    say(f"BLEU-1 to BLEU-4 with 500 draws: {fast:.2f} s, sacrebleu BLEU-1 and BLEU-4: {slow:.2f} s")
    return slow / fast


def labels_ratio(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return how much faster the eight label figures with 1,000 draws are than scikit-learn called for each draw."""
    f1_score = require("sklearn.metrics", "oracles").f1_score
    pair = LabelPair(
        label_array(labeler.label_report(text).labels for text in predictions),
        label_array(labeler.label_report(text).labels for text in references),
        "rules",
    )
    drawn = np.random.RandomState(3).randint(0, len(predictions), (LABEL_DRAWS, len(predictions)))

    def library(indices: np.ndarray) -> list[float]:
        values = []
        for positive in ((1,), (1, -1)):
            found, asked = np.isin(pair.predictions, positive), np.isin(pair.references, positive)
            for average in ("micro", "macro"):
                for columns in (list(range(14)), [1, 4, 5, 7, 9]):
                    one, other = asked[indices][:, columns], found[indices][:, columns]
                    values.append(float(f1_score(one, other, average=average, zero_division=0)))
        return values

    start = time.perf_counter()
    expected = np.array([library(indices) for indices in drawn[:SLOW_DRAWS]])
    slow = (time.perf_counter() - start) / SLOW_DRAWS

    def ours() -> np.ndarray:
        resampler = Resampler(range(len(predictions)), LABEL_DRAWS)
        return np.array([resampler.values(figure) for figure in label_figures(pair)])

    assert np.allclose(ours()[:, :SLOW_DRAWS].T, expected, atol=CLOSE, rtol=0)
    fast = seconds(ours, 2) / LABEL_DRAWS
    say(f"8 label figures: {fast * 1e3:.3f} ms a draw, scikit-learn {slow * 1e3:.1f} ms ({SLOW_DRAWS} draws)")
    return slow / fast


def labeller_ratio(texts: Sequence[str]) -> float:
    """Return how much faster the rules label a report than the CheXbert network does, on one thread without a cache."""
    import torch
    from transformers import BertConfig

    from llava.eval.reports.chexbert import BATCH, new_network

    torch.set_num_threads(1)
    distinct = list(dict.fromkeys(texts))[:LABELED]

    def rules() -> None:
        labeler._sentence_evidence.cache_clear()
        for text in distinct:
            labeler.label_report(text)

    fast = seconds(rules, 2) / len(distinct)
    network = new_network(BertConfig()).eval()
    # Words and marks are fewer than word pieces, so the network does less than it would.
    lengths = sorted(2 + len(text.split()) + text.count(".") + text.count(",") for text in distinct)
    middle = lengths[len(lengths) // 2 - BATCH // 2 :][:BATCH]
    ids = torch.randint(1000, 2000, (BATCH, max(middle)))
    with torch.inference_mode():
        slow = seconds(lambda: network(ids, torch.ones_like(ids)), 3) / BATCH
    say(f"labels of a report: rules {fast * 1e3:.2f} ms, CheXbert network {slow * 1e3:.1f} ms ({max(middle)} tokens)")
    return slow / fast


_CHILD = """
import json, resource, sys
from llava.eval.reports.cli import score_main
score_main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sys.stderr.write(json.dumps({"peak": peak, "torch": "torch" in sys.modules}) + "\\n")
"""


def peak_memory(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the peak memory of a scoring process in MB: text scorers, given labels and rules.

    Raises:
        ConfigError: the process fails.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = enumerate(zip(predictions, references, strict=True))
        with (folder / "in.jsonl").open("w") as reports, (folder / "labels.jsonl").open("w") as labels:
            for index, (prediction, reference) in rows:
                reports.write(json.dumps({"id": f"p{index}", "prediction": prediction, "reference": reference}) + "\n")
                side = {name: None if index % 3 else 1 for name in FINDINGS}
                labels.write(json.dumps({"index": index, "prediction": side, "reference": side}) + "\n")
        words = [
            str(folder / "in.jsonl"),
            "--labels",
            str(folder / "labels.jsonl"),
            "--output-dir",
            str(folder / "out"),
        ]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(f"scoring failed: {done.stderr[-300:]}")
        facts = json.loads(done.stderr.splitlines()[-1])
    assert not facts["torch"]
    taken = time.perf_counter() - start
    say(f"run.py on {len(predictions)} pairs: {taken:.1f} s, peak {facts['peak']:.0f} MB, no torch")
    return float(facts["peak"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = Parser(prog="report_metrics", description="Speed and memory of the report metrics.")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="number of report pairs")
    args = parser.parse_args(argv)
    texts = read_findings()
    references = [texts[row % len(texts)] for row in range(args.pairs)]
    predictions = [texts[(7 * row + row // len(texts) + 1) % len(texts)] for row in range(args.pairs)]
    say(f"{args.pairs} pairs, {len(set(references))} distinct references, one thread")
    memory = peak_memory(predictions, references)
    from benchmarks.common import machine  # loads torch: the peak of a process is at least that of its parent

    say(machine())
    ratios = {
        "rouge": rouge_ratio(predictions, references),
        "bleu": bleu_ratio(predictions, references),
        "labels": labels_ratio(predictions, references),
        "labeller": labeller_ratio(texts),
    }
    say(" ".join(["RATIO", *(f"{name}={value:.1f}" for name, value in ratios.items()), f"memory={memory:.0f}"]))


if __name__ == "__main__":
    if any(os.environ.get(name) != "1" for name in THREADS):
        command = [sys.executable, "-m", "benchmarks.report_metrics", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **dict.fromkeys(THREADS, "1")})
    run_program(main)
