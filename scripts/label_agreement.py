"""Compare the labels of the rules with index terms that people gave the same reports.

    packaged reports --FINDINGS--> rules: stated or uncertain --+
                     --MeSH------> index terms -----------------+--> agreement of each finding, disagreements

The reports are those of Indiana University in the package torchxrayvision (`bash scripts/setup.sh rad`).
Index terms were given for the whole report, impression included.

python scripts/label_agreement.py --disagreements disagreements.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from llava.data.converters.iu_xray import packaged_documents, section_texts
from llava.report_labels.labeler import label_report
from llava.utils.cli import Parser, run_program
from llava.utils.jsonl import write_records
from llava.utils.reporting import text_table
from llava.utils.terminal import write_out

Term = Sequence[str]
"""A heading and its qualifiers: `cicatrix/lung/apex` is cicatrix, lung, apex."""


def headed(*headings: str) -> Callable[[Term], bool]:
    """Return the test for terms with one of these headings."""
    return lambda term: term[0] in headings


def lung_opacity(term: Term) -> bool:
    """Return whether a term is an opacity, or scars, markings or a density of the lung that is not a round one."""
    if term[0] in ("opacity", "infiltrate", "airspace disease"):
        return True
    return term[0] in ("cicatrix", "markings", "density") and "lung" in term and "round" not in term


TERMS: dict[str, Callable[[Term], bool]] = {
    "Cardiomegaly": lambda term: term[0] == "cardiomegaly" or (term[0] == "cardiac shadow" and "enlarged" in term),
    "Lung Opacity": lung_opacity,
    "Lung Lesion": lambda term: term[0] in ("nodule", "mass") or (term[0] == "density" and "round" in term),
    "Edema": headed("pulmonary edema", "pulmonary congestion", "heart failure"),
    "Consolidation": headed("consolidation"),
    "Pneumonia": headed("pneumonia"),
    "Atelectasis": headed("pulmonary atelectasis"),
    "Pneumothorax": headed("pneumothorax", "hydropneumothorax"),
    "Pleural Effusion": headed("pleural effusion", "hydropneumothorax"),
    "Pleural Other": lambda term: "pleura" in term and term[0] in ("thickening", "cicatrix", "calcinosis", "pleura"),
    "Fracture": headed("fractures, bone"),
    "Support Devices": headed("catheters, indwelling", "implanted medical device", "tube, inserted", "medical device"),
}
"""Index terms of each finding; the terms have none for the other two."""


@dataclass(slots=True)
class Agreement:
    """Counts of a finding, and the reports on which rules and terms differ."""

    both: int = 0
    rules_only: int = 0
    terms_only: int = 0
    disagreements: list[dict[str, Any]] = field(default_factory=list)

    @property
    def row(self) -> tuple[int, int, float, float, float]:
        """Number of reports with the terms, by the rules, then precision, recall and F1 of the rules."""
        terms, rules = self.both + self.terms_only, self.both + self.rules_only
        precision, recall = self.both / max(rules, 1), self.both / max(terms, 1)
        return terms, rules, precision, recall, 2 * self.both / max(terms + rules, 1)


def compare(documents: Iterable[tuple[str, Element]]) -> dict[str, Agreement]:
    """Return the agreement of rules and index terms of each finding, over reports with findings."""
    agreements = {finding: Agreement() for finding in TERMS}
    for name, root in documents:
        if not (text := section_texts(root).get("findings")):
            continue
        labels = label_report(text).labels
        terms = [(part.text or "").lower().strip().split("/") for part in root.iter("major")]
        for finding, agreement in agreements.items():
            indexed = ["/".join(term) for term in terms if TERMS[finding](term)]
            value = labels[finding]
            is_positive = value in (1, -1)
            if is_positive and indexed:
                agreement.both += 1
            elif is_positive or indexed:
                agreement.rules_only += is_positive
                agreement.terms_only += not is_positive
                row = {"report": name, "finding": finding, "rules": value, "terms": indexed, "text": text}
                agreement.disagreements.append(row)
    return agreements


def table(agreements: dict[str, Agreement]) -> str:
    """Return the table of the findings, the micro average last."""
    total = Agreement()
    for agreement in agreements.values():
        total.both += agreement.both
        total.rules_only += agreement.rules_only
        total.terms_only += agreement.terms_only
    cells: list[list[str]] = []
    for name, agreement in [*agreements.items(), ("micro", total)]:
        terms, rules, *scores = agreement.row
        cells.append([name, str(terms), str(rules), *(f"{score:.2f}" for score in scores)])
    return text_table(["finding", "index terms", "rules", "precision", "recall", "F1"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the disagreements where asked."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--disagreements", type=Path, metavar="FILE", help="write each disagreement here, with its text"
    )
    args = parser.parse_args(argv)
    agreements = compare(packaged_documents())
    write_out(table(agreements) + "\n")
    rows = [row for agreement in agreements.values() for row in agreement.disagreements]
    write_out(f"{len(rows)} disagreements\n")
    if args.disagreements:
        write_records(args.disagreements, rows)


if __name__ == "__main__":
    run_program(main)
