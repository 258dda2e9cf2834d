"""What is known about each public data set: where it comes from, under which terms, how large it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class SplitSize(NamedTuple):
    """Rows, and how many of them are open and closed questions, and the pictures of one split."""

    rows: int
    open: int
    closed: int
    images: int


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """A data set.

    Attributes:
        name: as messages call it; goes into the field `source` of every row.
        homepage: where it comes from.
        license: goes into the field `license` of every row.
        how_to_get: what to do, where a licence or a login is needed, and which files are read.
        sizes: published numbers of each split, by the name of the variant that is read.
        pins: SHA-256 over the sorted ids of a split (`split_hash`), by variant and split, where it is known.
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
    license="CC0 1.0 (pictures from MedPix)",
    how_to_get=(
        "No login. Download `VQA_RAD Dataset Public.json` and the folder `VQA_RAD Image Folder` from the homepage. "
        "The split in trainset.json and testset.json of later papers is read too."
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
        "No login. Download train.json, validation.json, test.json and imgs.zip (or Slake1.0.zip) and give the "
        "folder; an archive that is not unpacked is one more argument."
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
    license="MIT, as the data set's card states; the pictures come from textbooks and a public library",
    how_to_get=(
        "No login. Use the Parquet release (train-*, validation-*, test-*.parquet), or questions as JSON "
        "(train_qa.json, val_qa.json, test_qa.json) with the folder images/. The first release has its questions as "
        ".pkl files, which are programs, not data: they are not opened here."
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
        "No login. Release 1: train.csv, test.csv (or test_clean.csv) and images.zip. Release 2 (single pictures): "
        "train_2.csv, test_2.csv and images_2.zip."
    ),
)

IU_XRAY = DatasetCard(
    name="IU X-ray",
    homepage="https://openi.nlm.nih.gov/faq",
    license="CC BY-NC-ND 4.0 (Open-i; each report's XML names its own licence)",
    how_to_get=(
        "No login. Either NLMCXR_reports.tgz and NLMCXR_png.tgz from Open-i, or indiana_reports.csv, "
        "indiana_projections.csv and the folder images_normalized. There is no official split: one is made by report."
    ),
)

MIMIC_CXR = DatasetCard(
    name="MIMIC-CXR",
    homepage="https://physionet.org/content/mimic-cxr-jpg/",
    license="PhysioNet Credentialed Health Data License 1.5.0: do not share rows, pictures or text",
    how_to_get=(
        "Credentialed access: make a PhysioNet account, finish the required training (CITI, Data or Specimens Only "
        "Research), ask for credentialing, and sign the data use agreement of MIMIC-CXR and of MIMIC-CXR-JPG. Then "
        "download from MIMIC-CXR-JPG the folder files/ and mimic-cxr-2.0.0-{split,metadata,chexpert}.csv.gz, and "
        "from MIMIC-CXR mimic-cxr-reports.zip. Nothing is downloaded here, and no login is asked for."
    ),
)

ANNOTATIONS = DatasetCard(
    name="LLaVA-Rad annotations of MIMIC-CXR",
    homepage="https://physionet.org/content/llava-rad-mimic-cxr-annotation/",
    license=MIMIC_CXR.license,
    how_to_get=MIMIC_CXR.how_to_get
    + " The annotation files chat_{train,dev,test}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json need the same access.",
)
