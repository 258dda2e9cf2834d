"""Words that mention a finding, and words that look like a mention and are none."""

from __future__ import annotations

from llava.report_labels.entries import Entry, Finder, entries
from llava.report_labels.findings import SUPPORT_DEVICES

_GENERAL = "as in the published CheXpert rules; common in reports of intensive care"

MENTIONS: dict[str, tuple[Entry, ...]] = {
    "Enlarged Cardiomediastinum": (
        *entries(r"mediastinal widening"),
        Entry(r"widen(?:ed|ing) of the (?:\w+ )?mediastin\w+", "another order of words"),
    ),
    "Cardiomegaly": (*entries(r"cardiomegaly"), Entry(r"cardiac enlargement|enlarged heart", "names the finding")),
    "Lung Opacity": (
        *entries(
            r"opaci\w+",
            r"air ?space (?:disease|process|infiltrat\w+)",
            r"infiltrat\w+",
            r"interstitial (?:lung )?(?:markings?|prominence|changes|disease|thickening|pattern|reticul\w+)",
            r"(?:prominen\w+|increas\w+|coarsen\w+|thicken\w+) (?:of )?(?:the )?(?:(?:lung|pulmonary) )?interstiti\w+",
            r"increas(?:ed|ing) (?:\w+ )?densit(?:y|ies)",
            r"scar(?:s|ring)?",
        ),
        Entry(r"reticul\w+", "listed by the published rules"),
        Entry(
            r"interstiti\w+ (?:is|are|appears?|remains?)(?: \w+){0,2} "
            r"(?:prominent|thickened|increased|accentuated|coarse\w*)",
            "the markings without their name",
        ),
        Entry(r"air ?space (?:changes?|shadow\w*)", "other names of airspace disease"),
        Entry(r"interstitial densit(?:y|ies)", "another word for the markings"),
        Entry(r"(?:hazy|streaky|patchy|airspace|basilar|bibasilar|retrocardiac) densit(?:y|ies)", "said of opacities"),
        Entry(r"haziness|ground glass\w*|ggos?|opaque|white ?out", "other words for an opacity"),
        Entry(r"lungs? scarred|scarred lungs?", "another form of scarring"),
    ),
    "Lung Lesion": (
        *entries(r"mass(?:es)?", r"nodul\w+", r"cavitary(?: lesions?| areas?)?"),
        Entry(r"mass ?like", "a form of mass"),
        Entry(r"cavit(?:y|ies|ations?)", "a form of cavitary lesion"),
        Entry(r"(?:lung|pulmonary|focal|suspicious|parenchymal) lesions?", "a lesion of the lung in chest reports"),
        Entry(r"lesions? in the (?:\w+ ){0,3}(?:lobes?|lungs?)", "another order of words"),
        Entry(r"tumou?rs?|neoplas\w+|carcinoma", "names of what a lesion is"),
    ),
    "Edema": (
        *entries(r"edema\w*"),
        Entry(r"oedema\w*", "British spelling"),
        Entry(r"(?:congestive )?(?:heart|cardiac|cardiopulmonary) failure|chf|fluid overload", _GENERAL),
    ),
    "Consolidation": entries(r"consolidat\w+"),
    "Pneumonia": (
        *entries(r"(?:broncho ?)?pneumonias?", r"infecti\w+"),
        Entry(r"pneumonic|pneumonitis|pna", "other forms of pneumonia"),
    ),
    "Atelectasis": entries(r"atelecta\w+", r"collapsed?"),
    "Pneumothorax": (
        *entries(r"pneumothora\w+"),
        Entry(r"(?:hydro|hemo)pneumothora\w+", "air with fluid"),
        Entry(r"pneumothroax|pneumothorx|ptx", "common misspellings and the abbreviation"),
        Entry(r"pleural air(?: collections?)?", "the same in other words"),
    ),
    "Pleural Effusion": (
        *entries(r"effusions?", r"pleural fluid(?: collections?)?"),
        Entry(r"pleural (?:and|or) pericardial effusions?", "the second of the two is blocked"),
        Entry(r"(?:hydro|hemo|haemo)(?:pneumo)?thora\w+", "fluid in the pleural space"),
        Entry(r"fluid (?:in|within|along|tracking into) the (?:\w+ ){0,2}(?:fissures?|pleural spaces?)", _GENERAL),
        Entry(r"(?:loculated|localized) (?:\w+ )?fluid", _GENERAL),
    ),
    "Pleural Other": (
        *entries(
            r"pleural (?:\w+ )?thickening",
            r"(?:pleural|pleuro)(?:[/\s-]*(?:and )?parenchymal)? (?:\w+ )?scar(?:s|ring)?",
            r"fibrosis",
            r"fissural thickening",
        ),
        Entry(r"scarring/pleural thickening|pleural scarring/thickening", "written with a slash"),
        Entry(r"thickening (?:of|in|along) the (?:\w+ ){0,2}(?:pleura\w*|fissures?)", "another order of words"),
        Entry(r"fibrothorax|pleural rind|pleural peel", _GENERAL),
    ),
    "Fracture": entries(r"fractur\w+"),
    SUPPORT_DEVICES: (
        *entries(
            r"lines?",
            r"tub(?:es?|ing)",
            r"catheters?",
            r"picc",
            r"ports?|(?:medi|infusa|chemo) ?ports?|port ?a ?caths?|portacaths?",
            r"pacemakers?",
            r"(?:pacing|pacer|pacemaker) (?:leads?|devices?|wires?)",
            r"generators?",
            r"leads",
            r"(?:a|bi v )?icds?|defibrillators?",
            r"tracheostomy",
            r"valves?",
            r"devices?",
            r"\w*stimulators?",
        ),
        Entry(r"pacers?|electrodes?|lead", "parts of pacemakers"),
        Entry(r"drains?", "listed by the published rules"),
        Entry(r"hardware|screws?|plates?|rods?|fixation|orif|anchors?", "listed by the published rules"),
        Entry(r"(?:naso|oro)gastric|endotracheal|swan ganz|dobhoff|ett|ngt|ogt|balloon pump|cannulas?", _GENERAL),
        Entry(r"shunts?|filters?|loop recorder|coils?|occluders?|gastrostomy|lvad|impella", _GENERAL),
    ),
}
"""Words that mention a finding; of the heart and the mediastinum only those that name the abnormality."""

SOFT_MENTIONS: dict[str, tuple[Entry, ...]] = {
    "Edema": (
        *entries(
            r"congest(?:ion|ed)",
            r"engorge(?:d|ment)",
            r"indistinct(?:ness)?(?: central| pulmonary)*(?: vascul\w+| vessels?| margins?| margination)?",
            r"(?:prominen(?:t|ce)|increased)(?: of)?(?: the)?(?: \w+){0,2} vascul\w+",
            r"(?:vascul\w+|vessels|vascular markings) prominence",
            r"(?:vascul\w+|vascular markings|vessels) (?:is|are|appears?|remains?)(?: \w+){0,2} "
            r"(?:prominent|indistinct|increased|accentuated|enlarged)",
        ),
        Entry(r"cephali[sz]ation|vascular redistribution|venous hypertension", _GENERAL),
    ),
}
"""Words that make a finding uncertain."""

NOT_MENTIONS: dict[str, tuple[Entry, ...]] = {
    "Lung Opacity": (
        *entries(
            r"nodular opacit\w+",
            r"pleur(?:al|o)(?:[/\s-]*(?:and )?parenchymal)? (?:\w+ )?scar\w*",
        ),
        Entry(r"opacif\w+ of the (?:sinus|mastoid)\w*", "not in the chest"),
        Entry(r"radio ?opaque|opaque foreign", "said of objects"),
        Entry(r"surgical scars?|skin scars?", "not in the lung"),
    ),
    "Lung Lesion": (
        *entries(
            r"(?<!non.)calcifi\w+(?:[\s,/]+(?!and |or |with |no |is |are )\w+){0,5}?[\s,/]+(?:nodul\w+|mass\w*)",
            r"nodul\w+(?:[\s,]+(?!and |or |may |might |could |possibl|probabl|likely |presum)\w+){0,16}[\s,]+"
            r"granulom\w+",
            r"nodul\w+(?:[\s,]+\w+){0,6} suggests? a (?:previous|prior) granulom\w+",
            r"(?:thyroid|breast|mediastinal|soft tissue|bon[ey]|osseous|osteolytic|lytic|sclerotic|rib|renal|hepatic|"
            r"abdominal|paratracheal|paraspinal|substernal|chest wall) (?:mass(?:es)?|nodules?|lesions?)",
        ),
        Entry(r"granulom\w+ nodul\w+", "granulomas are not lesions"),
        Entry(r"mass effect", "said of neighboring organs"),
        Entry(
            r"nodul\w+(?:[\s,]+(?!not |and )\w+){0,12} (?:and )?(?:is|are|appears?|xxxx|be) calcified",
            "calcified nodules",
        ),
        Entry(r"(?:thoracic|chest|pleural|abdominal|peritoneal|body|oral|glenoid|nasal) cavit(?:y|ies)", "anatomy"),
        Entry(r"history of (?:\w+ )?carcinoma", "history, not an observation"),
        Entry(r"nodular(?: \w+){0,2} (?:contours?|liver|thickening|prominence|irregularit\w+)", "a form of others"),
        Entry(r"nodular(?: pleural)? scar\w*", "a form of scarring"),
    ),
    "Edema": (
        Entry(
            r"(?:soft tissue|subcutaneous|bowel wall|cutaneous|laryngeal|cerebral|brain|leg|pedal|ankle|peripheral) "
            r"edema",
            "not in the lung",
        ),
        Entry(r"vascular calcif\w+", "of arteries"),
        Entry(r"nasal congestion", "not in the lung"),
        Entry(r"indistinct(?:ness)?(?: \w+){0,4} (?:diaphragm\w*|heart border|costophrenic)", "said of borders"),
        Entry(r"(?:prominen(?:t|ce)|increased)(?: of)?(?: the)?(?: \w+){0,2} vascular pedicle", "mediastinum"),
        Entry(r"(?:bowel|bladder|stomach|uterine) congestion", "not in the lung"),
    ),
    "Pneumonia": (
        *entries(r"(?:granulomatous|histoplasmosis|tubercul\w+|fungal) (?:lung )?infecti\w+"),
        Entry(r"(?:osseous|bone|skin|urinary|soft tissue) infecti\w+", "not in the lung"),
    ),
    "Atelectasis": (
        Entry(r"(?:vertebral?|body|bodies|compression|endplate|disc)(?: \w+){0,3} collapsed?", "bones"),
        Entry(r"collapsed?(?: \w+){0,3} (?:vertebra\w*|bod(?:y|ies))", "bones"),
        Entry(r"patient collapsed?|syncope collapsed?|collapsed? at", "history"),
    ),
    "Pleural Effusion": (
        *entries(r"(?:pericardial|joint|suprapatellar|knee|ankle|elbow|hip|shoulder) (?:\w+ )?effusions?"),
    ),
    "Pleural Other": (
        Entry(r"cystic fibrosis|(?:hepatic|liver|retroperitoneal) fibrosis", "names of diseases"),
        Entry(r"pleural fluid thickening", "two words of a list"),
    ),
    "Fracture": (
        *entries(
            r"(?:wires?|sternotomy|leads?|screws?|rods?|cerclage|sutures?|hardware|catheter)(?: \w+){0,4} fractur\w+",
        ),
        Entry(r"fractured?(?: \w+){0,2} (?:wires?|sternotomy|leads?|screws?|rods?|hardware|catheter)", "of devices"),
        Entry(r"fractures? of (?:\w+ ){0,4}(?:wires?|leads?|screws?|rods?)|fractured(?: \w+){0,2} xxxx", "of devices"),
    ),
    SUPPORT_DEVICES: (
        *entries(
            r"(?:kerley |xxxx )?[abc] lines?",
            r"(?:pleural|fracture|paratracheal|paraspinal|mediastinal|junction(?:al)?|septal|joint|axillary|clavicular|"
            r"midclavicular|growth|skin|air fluid|lucent|sclerotic|fat|hair|physeal|curved?|dense|straight) lines?",
            r"(?:aortic|mitral|tricuspid|pulmonic|cardiac|heart) (?:valve )?(?:annul\w+|calcif\w+)",
            r"end ?plates?",
        ),
        Entry(r"calcif\w+(?: \w+){0,5} valves?|valv\w+ calcif\w+", "a valve of the patient"),
        Entry(r"(?:lung|suture|staple) lines?", "not devices"),
        Entry(r"in line with|leads? to|lead time|line of|lines of|under drain", "verbs and figures of speech"),
        Entry(r"bronchial tubes?|fallopian tubes?|plate like|growth plates?", "anatomy and forms"),
        Entry(r"right to left shunts?|left to right shunts?|intracardiac shunts?", "flow, not a device"),
        Entry(r"valve of|shunt vascularity", "not a device"),
    ),
}
"""Words that contain a mention of a finding and do not count as one."""

OTHER_ABNORMALITIES: tuple[Entry, ...] = (
    *entries(
        r"degenerat\w+",
        r"spondyl\w+",
        r"osteophyt\w+|spurring|spurs?|endplate changes?",
        r"\w*scolio\w+|\w*curvature|kyphos\w+|kyphotic",
        r"(?<!non.)(?!non)\w*calcif\w+",
        r"granulom\w+",
        r"herni\w+",
        r"hyper ?(?:inflat|expan|aerat|lucen)\w+|over ?inflat\w+",
        r"emphysem\w+|copd|obstructive|bulla\w?|bullous|bleb\w*",
        r"blunt\w+",
        r"elevat\w+|eventrat\w+|flatten\w+",
        r"deformit\w+|deformed|wedg\w+|compression",
        r"tortu\w+|tortour\w+|ectas\w+|ectatic|atherosclero\w+|unfold\w+|uncoil\w+|aneurysm\w*",
        r"osteopen\w+|demineral\w+|osteopor\w+|arthri\w+|arthro\w+|osteoarth\w+",
        r"\w*adenopathy|lymph (?:nodes?|xxxx)",
        r"thickening|fibro\w+|bronchiect\w+|bronchitis|cuffing|chronic (?:lung|interstitial|parenchymal)\w*",
        r"dislocat\w+|sublux\w+|sclero\w+|lytic|erosi\w+",
        r"volume loss|pneumoperitoneum|pneumomediastinum|free air|subcutaneous (?:air|emphysema|gas)|lucenc\w+",
        r"prominen\w+|enlarge\w+|dilat\w+|fullness|widen\w+|shift\w*|abnormal",
        r"narrow\w*|deviat\w+|retract\w+|capping|vertebroplast\w+|air fluid level\w*",
        r"densit(?:y|ies)|irregularit\w+",
        r"fusion|foreign bod(?:y|ies)|bullets?|prosthe\w+|stents?",
        r"mass(?:es)?|nodul\w+|lesions?|kerley|[ab] lines?|pericardial effusions?",
        r"pectus|diffuse idiopathic|dish|cysts?|cystic|obscur\w+|crescentic",
        r"post ?(?:surgical|operative)|lobectomy|mastectomy|resection|vertebroplasty|senescent",
    ),
    Entry(r"pneumatocele\w*|gallstones?|distended|distention|obstruction|anomal\w+|shrapnel", "abnormal by themselves"),
    Entry(
        r"\w*listhesis|retropulsion|syndesmophyt\w+|osteodystroph\w+|myeloma|enchondroma|infarct\w*|amputat\w+|goiter|"
        r"loss of (?:\w+ ){0,3}(?:height|definition|disc)|cortical defects?|deep sulcus|broken|disrupted|malignan\w+",
        "abnormal by themselves",
    ),
)
"""Words of abnormalities that none of the 13 findings covers."""

MENTION_FINDERS = {finding: Finder(table) for finding, table in MENTIONS.items()}
SOFT_FINDERS = {finding: Finder(table) for finding, table in SOFT_MENTIONS.items()}
NOT_FINDERS = {finding: Finder(table) for finding, table in NOT_MENTIONS.items()}
OTHER_FINDER = Finder(OTHER_ABNORMALITIES)
