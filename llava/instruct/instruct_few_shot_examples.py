"""Eight few-shot examples for a language model: a caption with its context, and the dialogue to write.

All figures, captions, sentences and dialogues were invented for this project. No example describes a real patient, a
real image or a published article, and the identifiers are not those of real articles.
"""

from __future__ import annotations

from typing import Any

DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
"""Image modalities, in the published order."""


def _example(number: int, domain: str, caption: str, context: list[str], *turns: tuple[str, str]) -> dict[str, Any]:
    """Return a row in the layout of the caption files, with the dialogue to write."""
    pmid, fig_id = f"9999000{number}", f"F{number}"
    conversations = [
        {"from": speaker, "value": text} for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {
        "pair_id": f"{pmid}_{fig_id}",
        "pmid": pmid,
        "fig_id": fig_id,
        "fig_label": f"Figure {number}",
        "fig_caption": caption,
        "in_text_mention": context,
        "domain": {name: name == domain for name in DOMAINS},
        "conversations": conversations,
    }


FEW_SHOT_EXAMPLES: list[dict[str, Any]] = [
    _example(
        1,
        "chest_xray",
        "Frontal chest film on admission. A dense wedge in the right upper zone with air bronchograms; the horizontal "
        "fissure is pulled upward.",
        [
            "The admission film ( Figure 1 ) was read as right upper lobe consolidation with some loss of volume, and "
            "the patient was treated for pneumonia."
        ],
        (
            "Is there anything unusual about the upper part of the lung on the left side of this image?",
            "Yes. Remember that the left side of the image is the patient's right. The right upper zone looks much "
            "whiter than the other side, roughly in the shape of a wedge, so there is less air in that part of the "
            "lung than one would expect.",
        ),
        (
            "What are the thin dark branching lines inside the white area?",
            "They look like air bronchograms: airways that still hold air and stand out against lung tissue that is "
            "filled with something denser. They suggest that the air spaces, rather than the airways, are filled.",
        ),
        (
            "Does that mean it is an infection?",
            "Consolidation like this is often seen with infection, but bleeding, inflammation and some tumours can "
            "look similar. The fissure also seems to be drawn upward, which points to some loss of volume. A "
            "radiologist or the treating physician would combine the image with symptoms and tests to decide.",
        ),
    ),
    _example(
        2,
        "chest_xray",
        "Upright chest radiograph two hours after insertion of a left-sided drain. A thin pleural line is still "
        "visible at the apex; the tip of the drain projects over the second rib.",
        [
            "A small apical pneumothorax remained after drainage ( Figure 2 ).",
            "No shift of the mediastinum was noted in Figure 2 .",
        ],
        (
            "What is the tube that I can see on the right side of the picture?",
            "It appears to be a chest drain. It enters from the side and runs upward, and its tip lies near the top "
            "of the patient's left lung.",
        ),
        (
            "Why would someone need a tube there?",
            "A drain is usually placed to let out air or fluid that has collected around the lung. Near the top of "
            "the lung there is a fine line with no lung markings beyond it, which fits a small amount of air that "
            "still remains in that space.",
        ),
        (
            "Is the heart pushed to one side?",
            "The heart and the other structures in the middle of the chest seem to keep their usual position, and "
            "that is reassuring. Whether the remaining air needs more treatment is a question for the medical team.",
        ),
    ),
    _example(
        3,
        "ct_scan",
        "Axial contrast-enhanced CT of the abdomen in the portal venous phase: a thin-walled lesion of water density "
        "in segment VI of the liver, without enhancement.",
        ["The lesion had no septa and no solid part ( Fig. 3 ) and was left alone; it measured the same a year later."],
        (
            "Which part of the body is shown here, and in which plane?",
            "This is a slice across the upper abdomen from a CT scan. The liver is the large organ on the left side "
            "of the image, and the bright vessels suggest that a contrast agent was given.",
        ),
        (
            "There is a round dark spot in the liver. How would you describe it?",
            "It is round with a smooth, sharp border and a very thin wall. It is evenly dark, much darker than the "
            "liver around it, and it does not seem to take up contrast, which suggests that it holds fluid.",
        ),
        (
            "Should one be worried about such a spot?",
            "A smooth, evenly dark, thin-walled spot often turns out to be a simple cyst, and those are usually "
            "harmless. A single slice cannot settle that, so a radiologist should look at the whole examination and "
            "compare it with earlier ones if there are any.",
        ),
    ),
    _example(
        4,
        "gross",
        "Cut surface of the resected kidney. A well-circumscribed golden-yellow mass with foci of haemorrhage bulges "
        "from the upper pole.",
        [
            "Macroscopically the tumour was soft and variegated ( Figure 4 ), and the renal vein was free.",
            "The remaining parenchyma in Figure 4 was unremarkable.",
        ],
        (
            "What organ is this and what can be seen on its cut surface?",
            "The shape and the brown outer tissue fit a kidney that has been cut open. At one end there is a rounded "
            "mass that stands out clearly from the rest.",
        ),
        (
            "What does the color of the mass look like?",
            "It is mostly yellow to golden, with some dark red patches. The yellow tone can come from cells that "
            "hold a lot of fat, and the dark red areas look like bleeding inside the mass.",
        ),
        (
            "Does the rest of the organ look affected?",
            "The tissue beyond the mass looks even, and the border between the two seems sharp. Whether the mass "
            "spreads further cannot be told from the outside; a pathologist would study samples under the "
            "microscope to find out.",
        ),
    ),
    _example(
        5,
        "gross",
        "Opened stomach with a crater-like defect on the lesser curvature; the margins are raised and the folds stop "
        "short of the edge.",
        ["The ulcer shown in Figure 5 had a firm, irregular rim."],
        (
            "Can you describe the inner surface in this photograph?",
            "The surface has many folds, as the inside of a stomach does. In one place the folds are interrupted by "
            "a hollow that looks like a crater.",
        ),
        (
            "How do the edges of that crater look?",
            "They look raised and uneven rather than flat and smooth, and the folds seem to end before they reach "
            "the edge.",
        ),
        (
            "What could cause something like that?",
            "It could be an ulcer. Raised, uneven edges make doctors think of a tumour as well, while benign ulcers "
            "more often have flat edges with folds that run up to them. Only samples of the tissue, read by a "
            "pathologist, can tell these apart.",
        ),
    ),
    _example(
        6,
        "histology",
        "Skin biopsy, haematoxylin and eosin, original magnification x100. Elongated rete ridges, parakeratosis and "
        "small collections of neutrophils in the stratum corneum.",
        ["The epidermis was thickened in a regular pattern ( Fig. 6 )."],
        (
            "What kind of tissue is in this microscope image?",
            "It looks like skin. The purple layer with many cells is the epidermis, and the pink, fibrous part "
            "below it is the dermis. The colors are those of a common pink and purple stain.",
        ),
        (
            "The lower border of the purple layer looks wavy. Is that expected?",
            "Some waviness is normal, but here the downward projections look longer than usual and rather regular, "
            "so the epidermis seems to be thickened.",
        ),
        (
            "Is there something special about the top layer?",
            "Yes. Small dark nuclei can still be seen in the outermost layer, where cells have normally lost them, "
            "and there are little clusters of inflammatory cells. Such a pattern occurs in several inflammatory "
            "skin conditions, so a dermatologist would put it together with how the skin looks.",
        ),
    ),
    _example(
        7,
        "histology",
        "Lymph node core biopsy (H&E, x200): loosely formed granulomas with multinucleated giant cells; no necrosis "
        "is seen.",
        [
            "Granulomatous inflammation is evident in Figure 7 .",
            "Special stains for organisms were negative in the tissue of Figure 7 .",
        ],
        (
            "What stands out in this slide?",
            "Among the many small dark cells there are paler, rounded groups of larger cells. They look like "
            "granulomas, which are clusters of immune cells.",
        ),
        (
            "I see a very large cell with several nuclei. What is it?",
            "That appears to be a multinucleated giant cell, which forms when several immune cells merge. Such "
            "cells are commonly found in granulomas.",
        ),
        (
            "Is there dead tissue in the middle of these groups?",
            "The centres look cellular, and no area of dead tissue is apparent. That makes some causes less likely, "
            "but infections, sarcoidosis and other conditions can all look like this. More tests and a physician's "
            "judgement are needed to find the cause.",
        ),
    ),
    _example(
        8,
        "mri",
        "Sagittal T2-weighted image of the lumbar spine. The disc at L4/L5 is dark and bulges backward, indenting the "
        "thecal sac.",
        ["The protrusion at L4/L5 ( Figure 8 ) was on the side of the patient's leg pain."],
        (
            "What am I looking at in this scan?",
            "This is a side view of the lower back from an MRI scan. The blocks in a column are the vertebrae, and "
            "the structures between them are the discs. The bright band behind them is the fluid around the nerves.",
        ),
        (
            "One of the discs has another shade than the others. Why?",
            "A disc near the bottom looks darker. Discs tend to darken in this type of image as they lose water, "
            "which happens with wear and age.",
        ),
        (
            "Does it press on anything?",
            "It seems to bulge backward and to make a dent in the bright band behind it, so the space for the nerves "
            "is narrower there. A dent in an image does not always cause complaints; a physician would compare it "
            "with the symptoms and an examination.",
        ),
    ),
]
"""Two chest radiographs, a CT, two gross specimens, two microscope slides and an MR image."""
