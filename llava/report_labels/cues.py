"""Words that negate a finding, make it uncertain, end the scope of a cue, or state the heart size."""

from __future__ import annotations

from llava.report_labels.entries import Entry, Finder, entries, named_alternatives

_SEEN = (
    r"(?:seen|identified|present|demonstrated|visuali[sz]ed|evident|appreciated|noted|detected|observed|found|shown|"
    r"suggested|apparent|visible|suspected)"
)
_ELSEWHERE = (
    r"(?: \w+)? (?:previously|before|on (?:the )?(?:\w+ )?(?:prior|previous|lateral|frontal|earlier|comparison))"
)
_CHANGE = (
    r"(?:change(?:d|s(?! of))?|increase[sd]?|decrease[sd]?|improvement|progression|difference|enlargement in size)"
)
_REVEAL = r"(?:reveal|show|demonstrate|identify|detect|disclose|visuali[sz]e|display|confirm|suggest|find)"
_GENERAL = "listed by the published certainty rules"

CUES: dict[str, tuple[Entry, ...]] = {
    # Phrases without effect; they are listed before the cues that they contain.
    "none": (
        *entries(
            rf"(?:no|without|not)(?: \w+){{0,3}} {_CHANGE}(?: in| of| from)?",
            r"no comparison\w*|no (?:prior|previous|further)|"
            rf"not (?:well|optimally|fully|completely|adequately|easily|readily) (?!{_SEEN})\w+",
        ),
        Entry(
            r"(?:(?:has|have|had) )?(?:near(?:ly)?|almost|partial(?:ly)?|mostly|largely|incomplete(?:ly)?)(?: \w+)? "
            r"(?:resolved|cleared|disappeared|(?:resolution|clearing)(?: of)?)",
            "something is left",
        ),
        Entry(rf"no longer {_CHANGE}", _GENERAL),
        Entry(r"not clear(?=,| that| whether)", "says that something cannot be judged"),
        Entry(
            rf"(?:(?:is|are|was|were) )?not (?:(?:\w+ )?{_SEEN}{_ELSEWHERE}|previously {_SEEN})",
            "seen in another image",
        ),
        Entry(
            rf"(?:tips?|ends? of|side ?(?:ports?|holes?))(?: (?!not\b|and\b)\w+){{0,6}} not(?: \w+){{0,2}} {_SEEN}",
            "a part of a device that is there",
        ),
        Entry(
            r"(?:not|never) (?:\w+ly )?(?:without|free of|clear of|negative for|devoid of|lacking|absent)|"
            r"(?:no|not(?: \w+)?) (?:absence|lack) of",
            "two denials state",
        ),
        Entry(r"not all(?: \w+){0,6} (?:removed|resolved|cleared)", "some are left"),
        Entry(
            r"not only|not (?:(?:yet|significantly|substantially|grossly|fully|completely|entirely) )?"
            r"(?:changed|altered|improved|resolved|cleared|disappeared)",
            _GENERAL,
        ),
        Entry(
            r"(?:no|without)(?: \w+){0,2} (?:worsening|reduction|resolution|clearing) (?:of|in)", "it is still there"
        ),
        Entry(r"no (?:doubt|question)|without (?:a )?doubt", _GENERAL),
    ),
    "uncertain_before": (
        *entries(
            rf"(?:may|might|could)(?! (?:also |again )?(?:be (?:\w+ )?{_SEEN}|"
            r"be (?:obtained|performed|done|helpful|useful|missed|overlooked|hidden|masked)|"
            r"(?:co)?exist|persist|remain))",
            r"possibly|probably|perhaps",
            r"(?:suspicious|concerning|worrisome|suggestive) (?:for|of)",
            r"(?:cannot|can ?not|not)(?: be)?(?: \w+){0,2} exclude",
            r"suggest(?:s|ing|ed)?(?: of)?",
            r"favou?r(?!ed ?(?:[.;:)]|$|over))(?:ed|s|ing)?(?: to represent| to be)?",
            r"question(?:s|ed)?(?: of)?",
        ),
        Entry(r"(?:less )?likely(?! ?(?:[.;:)]|$))|presumably|potentially|conceivably|suggestion of", _GENERAL),
        Entry(r"(?:concern|suspicion|suspect\w*|worry) (?:for|of)|concern\w* about", _GENERAL),
        Entry(r"evaluat\w+ (?:for|of)|rule out|exclude|exclusion of", _GENERAL),
        Entry(r"(?:difficult|hard|impossible|unable) to (?:\w+ )?(?:exclude|rule out)", _GENERAL),
        Entry(r"differential(?: \w+){0,2} (?:includes?|is|are|considerations?)|versus|vs", _GENERAL),
        Entry(
            r"possibility of|consideration (?:of|to|for)|"
            r"(?:felt|thought|believed) to (?:be(?! unlikely)|represent|reflect)",
            _GENERAL,
        ),
        Entry(
            r"consider(?! (?:\w+ ){0,3}(?:ct|mri|follow|repeat|imaging|images?|radiographs?|views?|series|study|"
            r"evaluation|correlation|further))",
            "a diagnosis to think of; an examination is advice",
        ),
        Entry(r"(?:possible|probable|likely|conceivable) that|suspect|maybe", "without a noun"),
        Entry(r"(?:can|would) (?:also )?(?:represent|reflect|be (?:compatible|consistent|due|related|seen))", _GENERAL),
        Entry(r"(?:clinical )?correlat(?:e|ion) (?:clinically )?for|doubts?", _GENERAL),
        Entry(r"(?<=favored.)over", "the second of two"),
        Entry(
            r"query|not (?:impossible|inconceivable)|doubtful for|low (?:likelihood|probability) (?:of|for)", "doubt"
        ),
    ),
    "uncertain_near": (
        *entries(r"possible|probable|questionable|potential"),
        Entry(r"suspected(?! ?(?:[.;:)]|$))|presumed|equivocal|borderline|indeterminate for", _GENERAL),
        Entry(r"doubtful|presumptive|(?:, )?if (?:any|present),?", "as in `trace, if any, effusion`"),
    ),
    "uncertain_after": (
        *entries(
            r"(?:is|are|be|cannot|can ?not|not)(?: \w+){0,4} excluded",
        ),
        Entry(
            r"(?:is|are) (?:possible|probable|suspected|questioned|questionable|(?:less )?likely|considered|favored)"
            r"(?= ?(?:[.,;:)]|$|(?:in|at|over|on|given|with|but|based|and|or|by|though|although|as well)\b))",
            "as a predicate; before a noun, as in `is likely edema`, it is a cue of that noun",
        ),
        Entry(
            rf"(?:may|might|could) (?:also |again )?be (?:\w+ )?{_SEEN}|"
            r"(?:may|might|could) (?:(?:co)?exist|persist|remain)",
            "with the finding before it",
        ),
        Entry(rf"(?:is|are) (?:likely|probably|possibly|presumably) (?:also )?{_SEEN}", "as in `is likely present`"),
        Entry(
            r"(?:(?:is|are) )?(?:less )?(?:likely|suspected|doubtful|favored)(?= ?(?:[.;:)]|$))", "as in `edema likely`"
        ),
        Entry(r"(?:should|must|needs? to) (?:also )?be (?:considered|excluded)", _GENERAL),
        Entry(r"(?:is|are|remains?) (?:a )?(?:consideration|possibility|not unlikely)", _GENERAL),
        Entry(r"(?:cannot|can ?not) be ruled out|difficult to exclude|versus|vs", _GENERAL),
        Entry(r"not (?:be |been )?(?:\w+ )?ruled out", _GENERAL),
    ),
    "denied_after": (
        *entries(
            rf"(?:(?:is|are|was|were|be) )?(?:not|no longer)(?: \w+)? {_SEEN}",
            r"(?:has|have|had)(?: (?!not\b)\w+){0,2} (?:resolved|cleared|disappeared)|resolved",
            r"(?:has|have|had) been(?: (?!not\b)\w+)? (?:removed|withdrawn(?! \w*(?: \d| mm| cm))|excluded|ruled out)",
            r"(?:is|are|was|were)(?: \w+)? removed|removed",
            r"within (?:normal limits|limits of normal|normal range)",
        ),
        Entry(
            r"(?:is|are|was|were|seems?|appears?) (?:(?!not\b)\w+ )?"
            r"(?:unlikely(?! that| to (?:represent|reflect|indicate|be an?|be due))|improbable|negative(?! for)|"
            r"ruled out|excluded)|"
            r"(?:felt|considered|thought|believed|deemed) (?:to be )?unlikely|not (?:\w+ )?likely(?= ?(?:[.,;:)]|$))|"
            r": (?:none|absent|(?:no|negative)(?=[.!]*$))| (?:none|absent|excluded)(?=[.;!]|$)",
            _GENERAL,
        ),
        Entry(r"(?:has|have) not (?:recurred|returned|reappeared|re ?accumulated|developed)", "it is not there"),
        Entry(r"(?:is|are) (?:(?!not\b)\w+ )?absent|disappeared|(?:is|are|has|have) (?:now )?gone", _GENERAL),
        Entry(
            r"(?:is|are|was|were|been) (?:\w+ )?(?:pulled(?! back)|taken out|discontinued)|out(?= ?(?:[.,;)]|$))",
            "said of devices",
        ),
        Entry(
            r"(?:is|are) not(?: \w+)? (?:enlarged|engorged|congested|prominent|increased|indistinct)", "denied states"
        ),
    ),
    "denied_before": (
        Entry(
            r"not (?:\w+ )?(?:suggest|(?:suggestive|suspicious|concerning|worrisome|indicative) (?:of|for))", _GENERAL
        ),
        *entries(
            r"no|without|not",
            r"negative(?: for)?|free of|clear of|absence of|absent|clear(?= (?:focal )?air ?space)",
            r"(?:resolution|clearing|removal) of|(?:interval )?(?:removal|resolution)(?: of)?|removed|resolved",
        ),
        Entry(
            rf"fail(?:s|ed|ure)? to {_REVEAL}|none of|zero|nil|"
            r"nothing(?: \w+)?(?= (?:to (?:suggest|indicate)|suspicious|suggestive|concerning|worrisome))",
            "denials without `no`",
        ),
        Entry(
            r"nor|neither|denies|lack of|lacks|devoid of|rather than|instead of|ruled out|unlikely|exclud(?:es|ing)",
            _GENERAL,
        ),
    ),
}
"""Cues by effect; earlier kinds win at one place."""

CUE_PATTERN = named_alternatives(CUES)

STOPS = Finder(
    (
        *entries(
            r"but|however|although|though|except|otherwise|while|whereas|yet",
            r"there (?:is|are|has|have|was|were)",
            r"with",
            r"which|that (?:is|are|may|could)",
            r"other than|aside from|apart from|status post",
        ),
        Entry(r"resulting in|despite|in addition|since|given|after|following", _GENERAL),
    )
)
"""Words at which the reach of a cue ends."""

NOT_STOPS = Finder(
    (
        *entries(r"(?:consistent|compatible|associated|compared|comparison|deal\w*|correlat\w+|in keeping) with"),
        Entry(r"(?:may|might|could|can|would) be seen with", "a doubt about what is after it"),
        Entry(r"that there (?:is|are|was|were|has)", "as in `possible that there is`"),
    )
)
"""Words that contain a stop but do not end a cue's reach."""

HEART = Finder(
    (
        *entries(
            r"heart(?: \w+)? (?:size|silhouettes?|contours?|shadow)|heart|cardiac and mediastinal",
            r"cardiac (?:and |/ ?)?(?:size|silhouettes?|contours?|shadow|enlargement|xxxx)?",
        ),
        Entry(r"cardio ?pericardial silhouettes?", "another name of the silhouette of the heart"),
        Entry(r"cardio ?thoracic (?:ratio|index)", "the measure of its size"),
        Entry(r"cardiac(?=, (?:mediastinal|hilar|aortic))", "the first of several contours"),
    )
)
MEDIASTINUM = Finder(
    (
        *entries(
            r"(?:para|cardio ?|cardia )?mediastin(?:um|al)(?: and hilar| and cardiac)?"
            r"(?: silhouettes?| contours?| size| width| shadow| structures?| borders?)?"
        ),
        Entry(r"cardio ?thymic silhouettes?", "its name in children"),
    )
)
NOT_HEART = Finder(
    (
        *entries(
            r"cardio ?mediastin\w+",
            r"(?:behind|over|overl\w+|adjacent to|near|within|superior to|posterior to|between) the (?:\w+ )?heart",
            r"(?:heart|cardiac) (?:failure|disease|valves?|monitor\w*|pacemakers?|devices?|defibrillators?|generators?|"
            r"leads?|pacing|apex|surgery|borders?|margins?|stents?|bypass|fat|xxxx generators?|wires?|structures|icd)",
            r"cardiac xxxx (?:generator|device|overl\w+|with|project\w+|seen|present|in|and leads|is intact)",
        ),
        Entry(r"(?:borders?|apex|side|xxxx|base|region) of the heart", "a part of it"),
        Entry(r"(?:in|into|within) (?:the )?(?:right|left) heart|position of the cardiac", "the place of a device"),
        Entry(r"cardiac (?:tamponade|arrest|catheter\w*|history|apical)|heart (?:rate|transplant\w*)", "not its size"),
    )
)
NOT_MEDIASTINUM = Finder(
    (
        *entries(
            r"mediastin\w+(?: and (?:\w+ )?hilar)?(?: and hilar)? (?:lymph\w*|adenopathy|nodes?|calcif\w+|granulom\w+|"
            r"clips|shift|mass\w*|xxxx|surgical|postsurgical|fat|air|lines?|widening|evaluation|wires?|drains?|tubes?|"
            r"and vascular)",
            r"(?:anterior|posterior|calcified(?: \w+){0,2}) mediastin\w+",
        ),
        Entry(r"(?:over\w*|behind|in|within|of|and) (?:the )?(?:\w+ )?mediastinum(?= on| is xxxx|,|$)", "a place"),
        Entry(r"widen(?:ed|ing) of the (?:\w+ )?mediastin\w+", "a mention of its own"),
        Entry(r"changes (?:of|in) the mediastinum|clips(?: \w+){0,3} (?:in|over) the mediastinum", "a place"),
    )
)
OTHER_ORGANS = Finder(
    entries(
        r"aort\w+|\w*vascul\w+|vessels?|pulmonary|lungs?|hil(?:a|ar|um|i)|trachea|\w*diaphragms?|osseous|bon(?:y|es?)|"
        r"spine|pleura\w*|fat|ventric\w+|atri\w+|arter\w+|effusions?|pneumothora\w+|herni\w+|structures|soft tissues|"
        r"opaci\w+|leads|airways?|volumes?|consolidation|atelectasis|edema|thorax|chest|tortuosity|calcifications?|appendage|cardiomegaly"
    )
)

STATES: dict[str, tuple[Entry, ...]] = {
    "borderline": (
        *entries(r"(?:borderline|slightly borderline)(?: \w+)? ?(?:enlarge\w*|cardiomegaly|large|prominent|size)?"),
        Entry(
            r"(?:upper|top)(?: limits?)?(?: of)? ?normal(?: \w+){0,3} (?:or|to|and|versus) (?:\w+ )?enlarged", "a range"
        ),
        Entry(r"(?:normal|limits)(?: \w+){0,3} (?:or|to|versus) (?:\w+ )?(?:borderline|enlarged|prominent)", "a range"),
    ),
    "stable": (
        *entries(
            rf"no(?: \w+){{0,3}} {_CHANGE}|not (?:\w+ )?changed|without(?: \w+){{0,2}} change",
            r"stable|unchanged|similar|constant",
        ),
        Entry(r"unaltered|(?:same|no different) (?:as|from)", _GENERAL),
    ),
    "normal": (
        *entries(
            r"normal(?:ly)?|unremarkable|within (?:the )?(?:\w+ )?limits?|upper (?:\w+ )?limits?(?: of)?(?: normal)?",
            r"top(?: \w+)? normal|not (?:\w+ )?(?:enlarged|widened|prominent|dilated)|non ?enlarged|maintained|clear",
        ),
        Entry(r"preserved|intact|unenlarged|not remarkable|no(?: \w+){0,2} abnormalit\w+|negative|wnl", _GENERAL),
    ),
    "enlarged": (
        *entries(
            r"enlarge(?:d|ment)|large(?:r)?|prominen(?:t|ce)|widen(?:ed|ing)|increase(?:d)? in size|wide",
        ),
        Entry(r"(?:not|no longer)(?: \w+)? (?:normal|unremarkable|within (?:the )?(?:\w+ )?limits)", "denied states"),
        Entry(
            r"abnormal(?:ly)?(?= ?(?:in|size|heart|cardi\w+|mediastin\w+|contours?|silhouette|[.,;]|$))",
            "no other abnormality of its size is reported",
        ),
        Entry(
            r"dilated|dilation|increased|increase in(?= (?:the )?heart)|generous|globular|bigger",
            "other words for enlarged",
        ),
    ),
}
"""States of heart and mediastinum; earlier kinds win at one place."""

STATE_PATTERN = named_alternatives(STATES)
