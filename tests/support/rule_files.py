"""Rule files of the tests: bone marrow (example A of Dr-LLaVA's hierarchy) and electrocardiograms."""

from __future__ import annotations

from pathlib import Path

from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet

MARROW = r"""schema: llava.rules/v1
id: marrow
version: 1.0.0
nodes:
  - id: quality
    values: [high, low]
    extract:
      - {value: low, any: ['\b(unsuitable|inadequate)\b'], negatable: false}
      - {value: high, any: ['\b(suitable|adequate)\b'], negated: low}
  - id: cell_quality
    values: [adequate, blood, clot]
    confusable: [[blood, clot, 0.5]]
    extract:
      - {value: adequate, any: ['\bnucleated cells?\b'], priority: 10, negatable: false}
      - {value: clot, any: ['\bclot\w*']}
      - {value: blood, any: ['\bblood\b']}
  - id: abnormality
    values: [present, absent, inconclusive]
    abstain: inconclusive
    extract:
      - {value: inconclusive, any: ['\bquality\b'], priority: 20, negatable: false}
      - {value: absent, any: ['\bnormal\b'], priority: 10}
      - {value: present, any: ['\bmalignan\w*', '\bdisease'], negated: absent}
  - id: proliferation
    values: [blast, plasma, none, inconclusive]
    abstain: inconclusive
    extract:
      - {value: inconclusive, any: ['\bquality\b'], priority: 20, negatable: false}
      - {value: blast, any: ['\b(myelo)?blasts?\b'], negated: none}
      - {value: plasma, any: ['\bplasma( cells?)?\b'], negated: none}
      - {value: none, any: ['\b(unusual|abnormal)[^.]*(growth|increase)'], only_negated: true}
  - id: diagnosis
    values: [AML, MM, healthy, inconclusive]
    abstain: inconclusive
    primary: true
    extract:
      - {value: inconclusive, any: ['\bquality\b'], priority: 20, negatable: false}
      - {value: AML, any: ['\bacute myeloid leukemia\b', '\baml\b'], negated: healthy}
      - {value: MM, any: ['\bmultiple myeloma\b', '\bmm\b'], negated: healthy}
      - {value: healthy, any: ['\bhealthy\b'], priority: 5, negatable: false}
constraints:
  - id: low-quality
    if: {quality: low}
    then: {cell_quality: [blood, clot], abnormality: inconclusive, proliferation: inconclusive, diagnosis: inconclusive}
  - id: high-quality
    if: {quality: high}
    then:
      cell_quality: adequate
      abnormality: [present, absent]
      proliferation: [blast, plasma, none]
      diagnosis: [AML, MM, healthy]
  - {id: normal, if: {abnormality: absent}, then: {proliferation: none, diagnosis: healthy}}
  - {id: abnormal, if: {abnormality: present}, then: {proliferation: [blast, plasma], diagnosis: [AML, MM]}}
  - {id: blast-aml, if: {proliferation: blast}, then: {diagnosis: AML}}
  - {id: plasma-mm, if: {proliferation: plasma}, then: {diagnosis: MM}}
profiles:
  NORMAL: {quality: high, cell_quality: adequate, abnormality: absent, proliferation: none, diagnosis: healthy}
  AML: {quality: high, cell_quality: adequate, abnormality: present, proliferation: blast, diagnosis: AML}
  MM: {quality: high, cell_quality: adequate, abnormality: present, proliferation: plasma, diagnosis: MM}
  BLOOD: {quality: low, cell_quality: blood, abnormality: inconclusive, proliferation: inconclusive,
          diagnosis: inconclusive}
  CLOT: {quality: low, cell_quality: clot, abnormality: inconclusive, proliferation: inconclusive,
         diagnosis: inconclusive}
labels:
  - {when: {folder: adequate_normal}, profile: NORMAL}
  - {when: {folder: [adequate_AML, adequate_AML_Mono]}, profile: AML}
  - {when: {folder: adequate_MM}, profile: MM}
  - {when: {folder: blood}, profile: BLOOD}
  - {when: {folder: clot}, profile: CLOT}
"""

ECG = r"""schema: llava.rules/v1
id: ecg
nodes:
  - {id: st_elevation, values: ["true", "false"], extract: [{value: "true", any: [elevation], negated: "false"}]}
  - {id: st_depression, values: ["true", "false"], extract: [{value: "true", any: [depression], negated: "false"}]}
  - {id: troponin, values: ["true", "false"], extract: [{value: "true", any: [troponin], negated: "false"}]}
  - id: diagnosis
    values: [stemi, nstemi, normal]
    extract: [{value: stemi, any: ['\bstemi\b']}, {value: nstemi, any: ['\bnstemi\b']}, {value: normal, any: [normal]}]
profiles:
  NORMAL: {st_elevation: "false", st_depression: "false", troponin: "false", diagnosis: normal}
  STEMI: {st_elevation: "true", st_depression: "false", troponin: "true", diagnosis: stemi}
  NSTEMI: {st_elevation: "false", st_depression: "true", troponin: "true", diagnosis: nstemi}
"""

ANSWERS = {
    "high": "The region is suitable.",
    "low": "The region is unsuitable.",
    "adequate": "It has many nucleated cells.",
    "blood": "It has mostly blood.",
    "clot": "It has a clot.",
    "present": "There is a malignancy.",
    "absent": "It looks normal.",
    "inconclusive": "The quality is too poor.",
    "blast": "There are blasts.",
    "plasma": "There are plasma cells.",
    "none": "There is no increase in plasma cells.",
    "AML": "This is AML.",
    "MM": "This is MM.",
    "healthy": "The patient is healthy.",
}
"""An answer for each value of `MARROW`."""


def write_rules(folder: Path, text: str = MARROW) -> Path:
    """Write a rule file and return its path."""
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def rules_of(folder: Path, text: str = MARROW) -> RuleSet:
    """Return the rules of a text."""
    return load_rules(write_rules(folder, text))


SMEAR = r"""schema: llava.rules/v1
id: blood-smear-wbc
nodes:
  - {id: field, values: [evaluable, empty]}
  - {id: wbc_count, values: [none, single, multiple]}
  - {id: granules, values: [granular, agranular, not_applicable], abstain: not_applicable}
  - {id: granule_stain, values: [neutral, orange_red, dark_blue, not_applicable], abstain: not_applicable}
  - {id: nucleus, values: [segmented, round, indented, not_applicable], abstain: not_applicable}
  - id: cell_type
    values: [neutrophil, eosinophil, basophil, lymphocyte, monocyte, not_applicable]
    abstain: not_applicable
constraints:
  - {id: s1, if: {field: empty}, then: {wbc_count: none}}
  - id: s2
    if: {wbc_count: none}
    then: {field: empty, granules: not_applicable, granule_stain: not_applicable, nucleus: not_applicable,
           cell_type: not_applicable}
  - id: s3
    if: {wbc_count: single}
    then: {field: evaluable, granules: [granular, agranular], nucleus: [segmented, round, indented],
           cell_type: [neutrophil, eosinophil, basophil, lymphocyte, monocyte]}
  - id: s4
    if: {wbc_count: multiple}
    then: {field: evaluable, granules: not_applicable, granule_stain: not_applicable, nucleus: not_applicable,
           cell_type: not_applicable}
  - id: s5
    if: {granules: granular}
    then: {nucleus: segmented, granule_stain: [neutral, orange_red, dark_blue],
           cell_type: [neutrophil, eosinophil, basophil]}
  - id: s6
    if: {granules: agranular}
    then: {granule_stain: not_applicable, nucleus: [round, indented], cell_type: [lymphocyte, monocyte]}
  - {id: s7, if: {granule_stain: neutral}, then: {cell_type: neutrophil}}
  - {id: s8, if: {granule_stain: orange_red}, then: {cell_type: eosinophil}}
  - {id: s9, if: {granule_stain: dark_blue}, then: {cell_type: basophil}}
  - {id: s10, if: {nucleus: round}, then: {cell_type: lymphocyte}}
  - {id: s11, if: {nucleus: indented}, then: {cell_type: monocyte}}
"""
"""Example B of the hierarchy: one white cell of a smear."""

CHEST = r"""schema: llava.rules/v1
id: chest
nodes:
  - {id: adequacy, values: [adequate, inadequate]}
  - {id: abnormal, values: [present, absent, inconclusive]}
  - {id: opacity_pattern, values: [bilateral_peripheral_ground_glass, focal_consolidation, none, inconclusive]}
  - {id: final, values: [covid19, pneumonia, no_finding, inconclusive]}
constraints:
  - id: inadequate
    if: {adequacy: inadequate}
    then: {abnormal: inconclusive, opacity_pattern: inconclusive, final: inconclusive}
  - id: adequate
    if: {adequacy: adequate}
    then: {abnormal: [present, absent], final: [covid19, pneumonia, no_finding]}
  - {id: absent, if: {abnormal: absent}, then: {opacity_pattern: none, final: no_finding}}
  - id: present
    if: {abnormal: present}
    then: {opacity_pattern: [bilateral_peripheral_ground_glass, focal_consolidation], final: [covid19, pneumonia]}
  - {id: covid, if: {opacity_pattern: bilateral_peripheral_ground_glass}, then: {final: covid19}}
  - {id: pneumonia, if: {opacity_pattern: focal_consolidation}, then: {final: pneumonia}}
"""
"""Example C of the hierarchy: a chest radiograph."""
