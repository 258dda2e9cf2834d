"""Conversation of a session of the page, without a browser."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from llava.errors import DataError, LlavaError
from llava.imaging.decode import decode_image
from llava.imaging.dicom.policy import DicomPolicy
from llava.serve.image_inputs import ImageLimits, read_image
from llava.serve.messages import ImageInput, parse_chat
from llava.serve.page_chat import PageChat, PageImage, PageLog, note_of, phantom_png
from llava.serve.page_view import viewer_html
from tests.support.dicom_files import make

DICOM = make(np.arange(128, dtype=np.uint16).reshape(2, 8, 8), NumberOfFrames=2, WindowCenter=32, WindowWidth=64)


def asked(chat: PageChat) -> list[tuple[int, str]]:
    """Return the number of images and the text of each message, as a server reads the request."""
    body = chat.request_body("m", temperature=0.2, top_p=0.7, max_tokens=64)
    request = parse_chat({**body, "stream": True})
    return [(turn.text.count("<image>"), turn.text.replace("<image>\n", "")) for turn in request.conversation.turns]


def test_an_image_is_sent_with_the_question_after_it_and_not_again() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.png", phantom_png()))
    chat.ask("What?").answer = "A phantom."
    chat.ask("Where?")
    assert asked(chat) == [(1, "What?"), (0, "A phantom."), (0, "Where?")]


def test_a_changed_window_is_sent_again_and_earlier_turns_keep_theirs() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.dcm", DICOM))
    chat.ask("One?").answer = "1"
    chat.change(window="20,10")
    chat.ask("Two?")
    body = chat.request_body("m", temperature=0, top_p=1, max_tokens=64)
    windows = [message["content"][0]["image_url"]["window"] for message in body["messages"][::2]]
    assert windows == ["file", "20,10"]


def test_the_shown_pixels_are_those_of_the_window_and_frame_that_are_sent() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.dcm", DICOM))
    chat.change(window="90,20", frame=1)
    assert chat.current is not None
    part = chat.current.part()["image_url"]
    sent = decode_image(
        base64.b64decode(part["url"].partition(",")[2]), dicom=DicomPolicy(part["window"], str(part["frame"]))
    )
    shown = decode_image(base64.b64decode(chat.current.data_url().partition(",")[2]))
    assert np.array_equal(np.asarray(shown.image), np.asarray(sent.image))
    assert chat.current.caption == "window 90,20, frame 1"


def test_a_dicom_file_without_preamble_has_a_window_and_frames_too() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.dcm", DICOM[132:]))
    assert chat.current is not None and chat.current.is_dicom
    assert (chat.current.num_frames, chat.current.center, chat.current.width) == (2, 32, 64)
    chat.change(window="90,20", frame=1)
    sent = chat.current.part()["image_url"]
    data = read_image(ImageInput(sent["url"], sent["window"], str(sent["frame"])), ImageLimits())
    assert np.array_equal(np.asarray(decode_image(data).image), np.asarray(chat.current.shown_image()))
    assert not np.array_equal(np.asarray(chat.current.shown_image()), np.asarray(decode_image(DICOM).image))


@pytest.mark.parametrize("change", [{"window": "bones"}, {"window": "1,0"}, {"frame": 2}])
def test_a_wrong_window_or_frame_changes_nothing(change: dict[str, object]) -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.dcm", DICOM))
    with pytest.raises(LlavaError):
        chat.change(**change)  # type: ignore[arg-type]
    assert chat.current == PageImage.of("a.dcm", DICOM)


def test_a_withdrawn_question_gives_its_images_back() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.png", phantom_png()))
    chat.ask("What?").answer = "x"
    turn = chat.withdraw()
    assert turn is not None and turn.question == "What?" and PageChat().withdraw() is None
    chat.ask("Again?")
    assert asked(chat) == [(1, "Again?")]


def test_a_file_that_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        PageImage.of("a.txt", b"text")


def test_the_viewer_escapes_names_and_has_labels() -> None:
    chat = PageChat()
    assert "Add an image" in viewer_html(chat)
    chat.add(PageImage.of('"><script>.png', phantom_png()))
    shown = viewer_html(chat)
    assert "<script>" not in shown and 'aria-label="Image viewer' in shown and shown.count("<button") == 4


def test_notes_name_time_tokens_and_windows() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.dcm", DICOM))
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    chat.ask("What?")
    note = note_of(chat, usage, 1.25)
    assert note == "1.2 s; 5 tokens of prompt, 3 of them cached; 2 tokens of answer; window file, frame 0"


def test_the_windows_of_all_images_that_were_asked_about_stand_beside_every_answer() -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.dcm", DICOM))
    assert note_of(chat, None, 1) == "1.0 s"
    for question in ("What?", "Where?"):
        chat.ask(question).answer = "A"
        assert note_of(chat, None, 1) == "1.0 s; window file, frame 0"
    chat.add(PageImage.of("b.png", phantom_png()))
    chat.add(PageImage.of("c.dcm", DICOM))
    chat.change(window="20,10", frame=1)
    assert note_of(chat, None, 1) == "1.0 s; image 1: window file, frame 0"
    chat.ask("And here?").answer = "B"
    chat.ask("Why?").answer = "C"
    chat.change(window="full")  # the model has not seen it
    assert note_of(chat, None, 1) == "1.0 s; image 1: window file, frame 0; image 3: window 20,10, frame 1"
    chat.ask("And now?")
    assert note_of(chat, None, 1) == "1.0 s; image 1: window file, frame 0; image 3: window full, frame 1"


def test_votes_are_stored_in_the_original_layout_and_only_with_a_folder(tmp_path: Path) -> None:
    chat = PageChat()
    chat.add(PageImage.of("a.png", phantom_png()))
    chat.ask("What?").answer = "A phantom."
    PageLog().write("flag", chat, "m")
    assert list(tmp_path.iterdir()) == []
    PageLog(tmp_path / "logs").write("upvote", chat, "m")
    [path] = (tmp_path / "logs").iterdir()
    line = json.loads(path.read_text())
    assert path.name.endswith("-conv.json") and (line["type"], line["model"]) == ("upvote", "m")
    assert line["state"]["messages"] == [["user", "What?"], ["assistant", "A phantom."]]
    assert line["state"].keys() == {"system", "roles", "messages", "offset", "sep", "sep2"}
    assert len(line["images"][0]) == 32 and {"tstamp", "ip"} <= line.keys()
