"""Rule labels: mentions, denials, doubts, and the sizes of heart and mediastinum."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.report_labels.findings import FINDINGS, Label
from llava.report_labels.labeler import label_report
from llava.report_labels.scopes import MAX_SENTENCE, split_sentences

EC, CM, LO, LL = "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"
PNX, PE, PO, SD, NF = "Pneumothorax", "Pleural Effusion", "Pleural Other", "Support Devices", "No Finding"


def stated(text: str) -> dict[str, Label]:
    """Return the findings that a text mentions, without `No Finding`."""
    labels = label_report(text).labels
    return {name: value for name, value in labels.items() if value is not None and name != NF}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Trace left effusion, improved.", {PE: 1}),
        ("An old healed rib fracture is noted.", {"Fracture": 1}),
        ("Mild stable cardiomegaly.", {CM: 1}),
        ("Bibasilar subsegmental atelectasis.", {"Atelectasis": 1}),
        ("Collapse of the right lower lobe.", {"Atelectasis": 1}),
        ("Dense left lower lobe consolidation.", {"Consolidation": 1}),
        ("Right lower lobe pneumonia.", {"Pneumonia": 1}),
        ("A 9 mm noncalcified nodule projects over the left apex.", {LL: 1}),
        ("Cavitary lesion in the right apex.", {LL: 1}),
        ("Coarse interstitial markings.", {LO: 1}),
        ("Stable prominence of the pulmonary interstitium.", {LO: 1}),
        ("Reticular pattern at the bases.", {LO: 1}),
        ("Biapical scarring.", {LO: 1}),
        ("Bilateral apical pleural thickening.", {PO: 1}),
        ("Congestive heart failure.", {"Edema": 1}),
        ("Pulmonary vascular congestion.", {"Edema": -1}),
        ("Indistinct central pulmonary vessels.", {"Edema": -1}),
        ("Large left hydropneumothorax.", {PNX: 1, PE: 1}),
        ("A right subclavian port and a tracheostomy tube are in place.", {SD: 1}),
        ("Interstitial opacity consistent with edema.", {LO: 1, "Edema": 1}),
        ("Atelectasis/airspace disease at both bases.", {LO: 1, "Atelectasis": 1}),
        ("The pulmonary interstitium is prominent.", {LO: 1}),
        ("New air-space shadowing in the left lower zone.", {LO: 1}),
        ("Peripheral GGOs in both lungs.", {LO: 1}),
        ("White-out of the left hemithorax.", {LO: 1}),
        ("A cystic lesion in the right upper lobe.", {LL: 1}),
        ("A large pleural air collection is present on the right.", {PNX: 1}),
        ("A neurostimulator overlies the thoracic spine.", {SD: 1}),
        ("The opacity has nearly resolved.", {LO: 1}),
        ("Near-complete resolution of the left effusion.", {PE: 1}),
        ("Unchanged, suggesting no progression of the retrohilar nodule.", {LL: 1}),
        ("Hazy opacity is present and the right heart border is not visualized.", {LO: 1}),
        ("Small nodule in the left upper lung, possibly a granuloma.", {LL: 1}),
    ],
)
def test_stated(text: str, expected: dict[str, Label]) -> None:
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No consolidation, effusion or pneumothorax.", {"Consolidation": 0, PE: 0, PNX: 0}),
        ("No large effusion.", {PE: 0}),
        ("Lungs are clear of airspace disease, nodules, or effusion.", {LO: 0, LL: 0, PE: 0}),
        ("Negative for pneumothorax or pleural effusion.", {PNX: 0, PE: 0}),
        ("The effusion has resolved.", {PE: 0}),
        ("Interval resolution of left effusion.", {PE: 0}),
        ("Resolved interstitial edema.", {"Edema": 0}),
        ("The right chest tube has been removed.", {SD: 0}),
        ("Interval removal of the endotracheal tube.", {SD: 0}),
        ("The pneumothorax is no longer seen.", {PNX: 0}),
        ("Pneumothorax and effusion are not identified.", {PNX: 0, PE: 0}),
        ("No airspace opacity to suggest pneumonia.", {LO: 0, "Pneumonia": 0}),
        ("No suspicious mass.", {LL: 0}),
        ("Pulmonary vasculature is not engorged.", {"Edema": 0}),
        ("No large effusion no pneumothorax.", {PE: 0, PNX: 0}),
        ("Lungs clear without effusion. Fracture: none.", {PE: 0, "Fracture": 0}),
        ("No definite effusion, no edema.", {PE: 0, "Edema": 0}),
        ("No pneumothorax after line placement.", {PNX: 0, SD: 1}),
        ("Pneumothorax is not seen, and neither is effusion.", {PNX: 0, PE: 0}),
        ("The effusion and the pneumothorax are not seen.", {PE: 0, PNX: 0}),
        ("There is atelectasis rather than consolidation.", {"Atelectasis": 1, "Consolidation": 0}),
        ("Atelectasis, unlikely to represent pneumonia.", {"Atelectasis": 1, "Pneumonia": 0}),
        ("No pleural air collection.", {PNX: 0}),
        ("Resolution of the right effusion with persistent left effusion.", {PE: 1}),
        ("No effusion is evident, although the costophrenic angle is excluded.", {PE: 0}),
        ("The right chest tube has been removed, and there is a small right pneumothorax.", {SD: 0, PNX: 1}),
    ],
)
def test_denied(text: str, expected: dict[str, Label]) -> None:
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Opacity which may represent atelectasis.", {LO: 1, "Atelectasis": -1}),
        ("Opacity, possibly pneumonia.", {LO: 1, "Pneumonia": -1}),
        ("Probable small effusion.", {PE: -1}),
        ("Findings concerning for pneumonia.", {"Pneumonia": -1}),
        ("Opacity suspicious for pneumonia.", {LO: 1, "Pneumonia": -1}),
        ("A small pneumothorax is not excluded.", {PNX: -1}),
        ("Cannot exclude pneumonia.", {"Pneumonia": -1}),
        ("Pneumonia cannot be entirely excluded.", {"Pneumonia": -1}),
        ("Atelectasis or pneumonia in the left base.", {"Atelectasis": -1, "Pneumonia": -1}),
        ("Atelectasis versus consolidation.", {"Atelectasis": -1, "Consolidation": -1}),
        ("Scarring and/or atelectasis.", {LO: -1, "Atelectasis": -1}),
        ("Streaky opacities, atelectasis vs. scarring.", {LO: 1, "Atelectasis": -1}),
        ("Opacity in the right middle lobe or lingula.", {LO: 1}),
        ("Small effusion, possible underlying pneumonia.", {PE: 1, "Pneumonia": -1}),
        ("The opacity is likely atelectasis.", {LO: 1, "Atelectasis": -1}),
        ("Pneumonia is likely.", {"Pneumonia": -1}),
        ("Pneumonia is less likely.", {"Pneumonia": -1}),
        ("Opacities are favored to represent atelectasis.", {LO: 1, "Atelectasis": -1}),
        ("There is suspected lower lobe opacity.", {LO: -1}),
        ("There is a questionable nodule.", {LL: -1}),
        ("Cardiomegaly and/or pericardial effusion.", {CM: -1}),
        ("Cardiomegaly or, less likely, pericardial effusion.", {CM: -1}),
        ("A small effusion may be present.", {PE: -1}),
        ("An opacity could be seen at the left base.", {LO: -1}),
        ("At the left base may be seen an opacity.", {LO: -1}),
        ("A small effusion would be difficult to exclude.", {PE: -1}),
        ("Small, possible effusion.", {PE: -1}),
        ("Possible small, loculated effusion.", {PE: -1}),
        ("There may be stable, mild enlargement of the cardiac silhouette.", {CM: -1}),
        ("Opacity likely due to atelectasis and small effusion.", {LO: 1, "Atelectasis": -1, PE: -1}),
        ("The possibility of atypical infection should be considered.", {"Pneumonia": -1}),
        ("The differential diagnosis is pneumonia.", {"Pneumonia": -1}),
        ("Pleural densities may represent localized fluid.", {PE: -1}),
        ("No large effusion, although a small effusion cannot be excluded.", {PE: -1}),
        ("No displaced fractures, however nondisplaced fractures cannot be excluded.", {"Fracture": -1}),
        ("Nodule, probably in the middle lobe given the opacification on the lateral view.", {LL: 1, LO: 1}),
    ],
)
def test_uncertain(text: str, expected: dict[str, Label]) -> None:
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart is normal in size.", {CM: 0}),
        ("Heart size at the upper limits of normal.", {CM: 0}),
        ("The cardiac silhouette is enlarged.", {CM: 1}),
        ("Stable enlargement of the heart.", {CM: 1}),
        ("Borderline heart size.", {CM: -1}),
        ("Heart size is unchanged.", {CM: -1}),
        ("The heart is not enlarged.", {CM: 0}),
        ("Heart size is upper normal or mildly enlarged.", {CM: -1}),
        ("Cardiomediastinal silhouette is normal.", {EC: 0}),
        ("Cardio mediastinal silhouette is stable and within normal limits.", {EC: 0}),
        ("Stable cardiomediastinal silhouette.", {EC: -1}),
        ("Widened mediastinum.", {EC: 1}),
        ("No mediastinal widening.", {EC: 0}),
        ("Heart and mediastinum are unremarkable.", {CM: 0, EC: 0}),
        ("Heart size normal, stable mediastinal contours.", {CM: 0, EC: -1}),
        ("Heart size is enlarged, pulmonary vascularity within normal limits.", {CM: 1}),
        ("Normal heart size and mediastinal contours.", {CM: 0, EC: 0}),
        ("Views show an unchanged cardiomediastinal silhouette.", {EC: -1}),
        ("Heart is normal, the aorta is enlarged.", {CM: 0}),
        ("Calcified mediastinal lymph nodes.", {}),
        ("Cardiac and mediastinal contours are normal.", {CM: 0, EC: 0}),
        ("Opacity behind the heart is unchanged.", {LO: 1}),
        ("Enlargement of the cardiac silhouette, mediastinal contours appear similar to prior.", {CM: 1, EC: -1}),
        ("Normal heart size, mediastinal contours, and lungs.", {CM: 0, EC: 0}),
        ("Intact leads in the right heart.", {SD: 1}),
        ("Projection of the cardiac silhouette, suggesting left atrial enlargement.", {}),
        ("Stable position of the cardiac XXXX and leads.", {SD: 1}),
        ("Normal size and mediastinal contours.", {EC: 0}),
        ("Heart and mediastinum are stable with normal size heart.", {CM: 0, EC: -1}),
        ("Heart size is stable. The heart is normal.", {CM: 0}),
        ("Heart size is borderline. The heart is normal.", {CM: -1}),
        ("Heart size is unchanged. The heart is enlarged.", {CM: 1}),
        ("Cardiac, mediastinal and hilar contours are normal.", {CM: 0, EC: 0}),
        ("Increased cardiothoracic ratio.", {CM: 1}),
        ("The cardiothymic silhouette is within normal limits.", {EC: 0}),
        ("Normal appearance of the cardia mediastinal silhouette.", {EC: 0}),
    ],
)
def test_heart_and_mediastinum(text: str, expected: dict[str, Label]) -> None:
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Kerley B-lines are present.", {}),
        ("One sternotomy wire is fractured.", {}),
        ("A thyroid mass displaces the trachea.", {}),
        ("No change in pneumothorax.", {PNX: 1}),
        ("No interval change in the small effusion or pneumothorax.", {PE: 1, PNX: 1}),
        ("Calcified nodule in the right base.", {}),
        ("The nodule is unchanged and appears calcified.", {}),
        ("Non-calcified nodule in the right base.", {LL: 1}),
        ("No non-calcified nodules.", {LL: 0}),
        ("Nodular prominence of the hilum.", {}),
        ("The interstitium is not clear, making the vasculature indistinct.", {"Edema": -1}),
        ("Small pericardial effusion.", {}),
        ("Degenerative end plate changes.", {}),
        ("Midline trachea.", {}),
        ("Mass effect on the trachea.", {}),
        ("Cystic fibrosis.", {}),
        ("Pneumomediastinum.", {}),
        ("Limits are normal.There is no effusion.Heart size is normal.", {PE: 0, CM: 0}),
        ("The effusion<BR>has resolved.", {PE: 0}),
        ("No XXXX pneumothorax.", {PNX: 0}),
        ("Cardiomegaly without edema.", {CM: 1, "Edema": 0}),
        ("No effusion, but there is a small pneumothorax.", {PE: 0, PNX: 1}),
        ("No pneumothorax with a small left effusion.", {PNX: 0, PE: 1}),
        ("There is no edema and the heart is enlarged.", {"Edema": 0, CM: 1}),
        ("No pneumothorax. Nodule measures 1.2 cm.", {PNX: 0, LL: 1}),
        ("If there is concern for fracture, consider a rib series.", {}),
        ("Bony overlap in the lung apices could obscure a small pulmonary nodule.", {}),
        ("The left effusion may mask a mass or pneumonia.", {PE: 1}),
        ("Overlying leads might hide a fracture, there is no pneumothorax.", {SD: 1, PNX: 0}),
        ("The left heart border is obscured by an effusion.", {PE: 1}),
        ("Scapulae may obscure a nodule and there is a right pleural effusion.", {PE: 1}),
        ("Overlying leads could hide a rib fracture but a left pneumothorax is present.", {SD: 1, PNX: 1}),
        ("Edema may obscure pneumonia and effusions are large.", {"Edema": 1, PE: 1}),
        ("This could easily obscure underlying pneumonia, a mass, or effusion.", {}),
        ("Edema has not resolved.", {"Edema": 1}),
        ("The pneumothorax has not completely resolved.", {PNX: 1}),
        ("Effusions have not cleared.", {PE: 1}),
        ("Effusion has resolved.", {PE: 0}),
        ("Pneumonia has been ruled out.", {"Pneumonia": 0}),
        ("Pneumothorax was excluded by CT.", {PNX: 0}),
        ("Pneumonia was not ruled out.", {"Pneumonia": -1}),
        ("No worsening of the effusion.", {PE: 1}),
        ("Edema improved, now resolved.", {"Edema": 0}),
        ("Pneumothorax, which has resolved.", {PNX: 0}),
        ("Previously seen effusion has disappeared.", {PE: 0}),
        ("There is effusion, edema has resolved.", {PE: 1, "Edema": 0}),
        ("No resolution of the pneumothorax.", {PNX: 1}),
        ("PNEUMOTHORAX: NO.", {PNX: 0}),
        ("Dense nodule and hilar calcifications suggest a previous granulomatous process.", {}),
        ("No laryngeal edema.", {}),
        ("Increased vascular calcifications.", {}),
        ("INDICATION: Rule out pneumonia. COMPARISON: None. FINDINGS: No effusion.", {PE: 0}),
        (
            "HISTORY: Cough, possible pneumonia\nFINDINGS: No consolidation.\nIMPRESSION: Edema.",
            {"Consolidation": 0, "Edema": 1},
        ),
        ("Comparison: Chest CT. There is a small effusion.", {PE: 1}),
    ],
)
def test_traps(text: str, expected: dict[str, Label]) -> None:
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The lungs are clear. Heart size is normal.", 1),
        ("Low lung volumes. No effusion.", 1),
        ("A right PICC is in place. No pneumothorax.", 1),
        ("Clear lungs. Degenerative changes of the spine.", None),
        ("Clear lungs. Calcified granuloma.", None),
        ("Clear lungs without hyperinflation.", 1),
        ("Small effusion.", None),
        ("Possible pneumonia.", None),
        ("Clear lungs. Heart size is stable. The heart is normal.", 1),
        ("Clear lungs. Heart size is stable.", None),
        ("Clear lungs. Mild rightward deviation of the trachea.", None),
        ("Clear lungs. Minimal retrolisthesis.", None),
        ("Clear lungs. The trachea is not deviated.", 1),
        ("", None),
    ],
)
def test_no_finding(text: str, expected: Label) -> None:
    assert label_report(text).labels[NF] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. Small effusion.", 1),
        ("No effusion on the right. Possible left effusion.", -1),
        ("Possible left effusion. Small right effusion.", 1),
    ],
)
def test_strongest_mention_wins(text: str, expected: Label) -> None:
    assert label_report(text).labels[PE] == expected


NAMES = {"small effusion": PE, "atelectasis": "Atelectasis", "infection": "Pneumonia", "a nodule": LL, "edema": "Edema"}
HEDGES = ("Possible", "Suspicious for", "Findings may represent", "Concerning for", "Questionable", "Cannot exclude")
JOINS = (", or ", " or ", ", and/or ", " versus ")


@pytest.mark.parametrize("hedge", HEDGES)
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_every_alternative_under_a_hedge_is_uncertain(hedge: str, join: str, num: int) -> None:
    names = list(NAMES)[:num]
    text = f"{hedge} {', '.join(names[:-1])}{join}{names[-1]}."
    assert stated(text) == dict.fromkeys([NAMES[name] for name in names], -1)
    denied = f"No {', '.join(names[:-1])} or {names[-1]}."
    assert stated(denied) == dict.fromkeys([NAMES[name] for name in names], 0)


@pytest.mark.parametrize("denial", ["without", "free of", "clear of", "devoid of", "negative for"])
def test_two_denials_state(denial: str) -> None:
    assert stated(f"The chest is {denial} effusion.") == {PE: 0}
    assert stated(f"The chest is not {denial} effusion.") == {PE: 1}


@pytest.mark.parametrize("apostrophe", ["'", "\u2019"])
@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("There isn't an effusion.", "There is not an effusion."),
        ("Pneumothorax wasn't seen.", "Pneumothorax was not seen."),
        ("The effusion hasn't resolved.", "The effusion has not resolved."),
        ("Pneumonia can't be excluded.", "Pneumonia cannot be excluded."),
        ("The heart isn't enlarged.", "The heart is not enlarged."),
    ],
)
def test_contractions_are_denials(short: str, long: str, apostrophe: str) -> None:
    text = short.replace("'", apostrophe)
    assert stated(text) == stated(long) != {}
    for part in label_report(text).evidence:
        assert text[part.start : part.end].lower() in long.lower() and "  " not in part.cue


@pytest.mark.parametrize("sentence", ["Small effusion", "No effusion", "Is there an effusion", "Effusion or nodule"])
def test_a_question_is_uncertain(sentence: str) -> None:
    assert set(stated(f"{sentence}?").values()) == {-1}
    assert stated(f"Cardiomegaly. {sentence}? No edema.") == {CM: 1, "Edema": 0, **stated(f"{sentence}?")}


@given(st.text(alphabet="ab .,\n", max_size=3 * MAX_SENTENCE))
def test_sentences_are_the_whole_text_in_short_parts(text: str) -> None:
    parts = list(split_sentences(text))
    assert all(0 < end - start <= MAX_SENTENCE for start, end in parts)
    assert "".join("".join(text[start:end] for start, end in parts).split()) == "".join(text.split())
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(parts))


@pytest.mark.parametrize(
    "words",
    [
        *("no effusion ", "may represent effusion or ", "nodule ", "effusion, ", "\nIndication: ", "\n", "x", "("),
        *(
            "possible a/b/",
            "possible effusion, nodule, ",
            "effusion, or ",
            "?a ",
            "opacity ?a b",
            "effusion: no ",
            "- A ",
        ),
    ],
)
def test_endless_texts_need_little_time(words: str) -> None:
    text = (words * 100_000)[:100_000] + ". Small effusion."
    started = time.process_time()
    assert label_report(text).labels[PE] == 1
    assert time.process_time() - started < 20  # 0.3 s; before sentences were cut, some took minutes


def test_places_after_a_part_that_is_left_out() -> None:
    text = "Indication: possible edema. Findings: Small effusion."
    [part] = label_report(text).evidence
    assert (part.finding, text[part.start : part.end]) == (PE, "effusion")


def test_evidence_names_the_place_in_the_text() -> None:
    text = "Heart size is normal. No Pleural Effusion.  Possible pneumonia."
    evidence = {part.finding: part for part in label_report(text).evidence}
    effusion, pneumonia = evidence[PE], evidence["Pneumonia"]
    assert (text[effusion.start : effusion.end], effusion.value, effusion.cue) == ("Effusion", 0, "no")
    assert (text[pneumonia.start : pneumonia.end], pneumonia.value, pneumonia.cue) == ("pneumonia", -1, "possible")
    assert (evidence[CM].value, evidence[CM].cue) == (0, "normal")


@given(st.text(max_size=300))
def test_any_text_has_labels_and_places_within_it(text: str) -> None:
    found = label_report(text)
    assert list(found.labels) == list(FINDINGS)
    assert set(found.labels.values()) <= {1, 0, -1, None}
    assert all(0 <= part.start < part.end <= len(text) for part in found.evidence)


WORDS = (
    "no without possible may represent small left effusion pneumothorax heart size is normal enlarged . , or and but "
    "opacity atelectasis versus resolved not excluded İ <BR> XXXX"
)


@given(st.lists(st.sampled_from(WORDS.split()), max_size=25))
def test_evidence_explains_the_labels(words: list[str]) -> None:
    found = label_report(" ".join(words))
    for name in FINDINGS[:-1]:
        values = {part.value for part in found.evidence if part.finding == name}
        expected = next((value for value in (1, -1, 0) if value in values), None)
        assert found.labels[name] == expected
