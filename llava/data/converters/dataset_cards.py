"""Descriptions of the public datasets: homepage, license, how to get them and published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class SplitSize(NamedTuple):
    """Numbers of rows, open and closed questions, and images of one split."""

    rows: int
    open: int
    closed: int
    images: int


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """Description of a dataset.

    Attributes:
        name: name in messages and in the field `source` of every row.
        homepage: URL.
        license: value of the field `license` of every row.
        how_to_get: how to get the files, including license and login, and which files are read.
        sizes: published numbers of each split, by variant.
        pins: known SHA-256 over the sorted ids of a split (`split_hash`), by variant and split.
    """

    name: str
    homepage: str
    license: str
    how_to_get: str
    sizes: Mapping[str, Mapping[str, SplitSize]] = field(default_factory=dict)
    pins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


VQA_RAD = DatasetCard(
    name="VQA-RAD",
    homepage="https://osf.io/89kps/",
    license="CC0 1.0 (images from MedPix)",
    how_to_get=(
        "No login. Download `VQA_RAD Dataset Public.json` and the folder `VQA_RAD Image Folder` from the homepage. "
        "trainset.json and testset.json, the split of later papers, are read too."
    ),
    sizes={
        "public": {"train": SplitSize(1797, 770, 1027, 313), "test": SplitSize(451, 179, 272, 203)},
        "data_RAD": {"train": SplitSize(3064, 1241, 1823, 314), "test": SplitSize(451, 179, 272, 203)},
    },
)

SLAKE = DatasetCard(
    name="SLAKE",
    homepage="https://www.med-vqa.com/slake/",
    license="CC BY 4.0",
    how_to_get=(
        "No login. Download train.json, validation.json, test.json and imgs.zip (or Slake1.0.zip) and pass the "
        "folder; pass packed archives as further arguments."
    ),
    sizes={
        "en": {
            "train": SplitSize(4919, 2976, 1943, 450),
            "val": SplitSize(1053, 631, 422, 96),
            "test": SplitSize(1061, 645, 416, 96),
        },
    },
)

PATHVQA = DatasetCard(
    name="PathVQA",
    homepage="https://github.com/UCSD-AI4H/PathVQA",
    license="MIT, as the dataset card states; the images come from textbooks and a public library",
    how_to_get=(
        "No login. Use the Parquet release (train-*, validation-*, test-*.parquet), or questions as JSON "
        "(train_qa.json, val_qa.json, test_qa.json) with the folder images/. The questions of the first release are "
        "pickle files (.pkl), which can run code when they are loaded; they are not read."
    ),
    sizes={
        "json": {
            "train": SplitSize(19755, 9949, 9806, 2599),
            "val": SplitSize(6279, 3144, 3135, 832),
            "test": SplitSize(6761, 3370, 3391, 858),
        },
    },
)

PMC_VQA = DatasetCard(
    name="PMC-VQA",
    homepage="https://huggingface.co/datasets/xmcmic/PMC-VQA",
    license="CC BY-SA; the articles are CC0 or CC BY",
    how_to_get=(
        "No login. Release 1: train.csv, test.csv (or test_clean.csv) and images.zip. Release 2 (single images): "
        "train_2.csv, test_2.csv and images_2.zip."
    ),
)

IU_XRAY = DatasetCard(
    name="IU X-ray",
    homepage="https://openi.nlm.nih.gov/faq",
    license="CC BY-NC-ND 4.0 (Open-i; each report's XML names its own license)",
    how_to_get=(
        "No login. Either NLMCXR_reports.tgz and NLMCXR_png.tgz from Open-i, or indiana_reports.csv, "
        "indiana_projections.csv and the folder images_normalized. There are no official splits; reports are assigned "
        "to splits by hash."
    ),
)

MIMIC_CXR = DatasetCard(
    name="MIMIC-CXR",
    homepage="https://physionet.org/content/mimic-cxr-jpg/",
    license="PhysioNet Credentialed Health Data License 1.5.0: do not share rows, images or text",
    how_to_get=(
        "Credentialed access: create a PhysioNet account, complete the required training (CITI, Data or Specimens Only "
        "Research), apply for credentialing, and sign the data use agreements of MIMIC-CXR and MIMIC-CXR-JPG. Then "
        "download the folder files/ and mimic-cxr-2.0.0-{split,metadata,chexpert}.csv.gz from MIMIC-CXR-JPG, and "
        "mimic-cxr-reports.zip from MIMIC-CXR. This command downloads nothing and needs no login."
    ),
)

ANNOTATIONS = DatasetCard(
    name="LLaVA-Rad annotations of MIMIC-CXR",
    homepage="https://physionet.org/content/llava-rad-mimic-cxr-annotation/",
    license=MIMIC_CXR.license,
    how_to_get=MIMIC_CXR.how_to_get
    + " The annotation files chat_{train,dev,test}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json need the same access.",
)
