"""Tokenize conversations into ids and labels; all tokenization happens here.

    Conversation --template--> segments --tokenize_segments--> Draft --truncate--> Encoded

The rendered text is split at its image placeholders and each piece is tokenized separately, as the published models
were trained: begin-of-text once, then piece, image, piece, ... A token is trained when the character at which it starts
lies in a trained segment; token counts are not used, and no text is tokenized twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from llava.constants import IGNORE_INDEX, IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.conversation import Segment
from llava.errors import DataError
from llava.imaging.anyres import Size
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokenized conversation of T tokens.

    Attributes:
        input_ids: [T] token ids, each image already expanded to its placeholder tokens.
        labels: [T] `input_ids[t]` where token t is trained, else -100.
        turns: [T] index of the conversation turn that token t was rendered from, -1 for the system text.
        image_spans: `(start, stop)` of the placeholder tokens of each image, in order.
        images: key of each image (hash of bytes and preprocessing); equal keys are equal model inputs.
        num_cut: number of tokens that truncation removed.
        image_sizes: width and height of each image where the number of tokens depends on them; else empty.
        source: number of the mixture source that the row is from.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[int, ...]
    image_spans: tuple[tuple[int, int], ...] = ()
    images: tuple[str, ...] = ()
    num_cut: int = 0
    image_sizes: tuple[Size, ...] = ()
    source: int = 0


@dataclass(slots=True)
class Draft:
    """Tokens before truncation, with their place in the rendered text; other fields are as in `Encoded`.

    Attributes:
        ids: token ids.
        trained: whether each token is trained.
        characters: `(start, stop)` of each token in the rendered text; image tokens have that of their placeholder.
        in_block: whether each token belongs to an image (its patches and the markers around them).
    """

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    characters: list[tuple[int, int]] = field(default_factory=list)
    in_block: list[bool] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)

    def add(
        self, token: int, characters: tuple[int, int], *, turn: int, trained: bool = False, in_block: bool = False
    ) -> None:
        """Append one token."""
        self.ids.append(token)
        self.trained.append(trained)
        self.turns.append(turn)
        self.characters.append(characters)
        self.in_block.append(in_block)


def encode(
    conversation: Conversation,
    processor: LlavaMedProcessor,
    *,
    images: Sequence[str] = (),
    sizes: Sequence[Size] | None = None,
    max_length: int | None,
    image_counts_as_one: bool = False,
) -> Encoded:
    """Return the training sequence of a conversation.

    Example::

        turns = (Turn("human", "<image>\nWhat is shown?"), Turn("gpt", "A chest X-ray."))
        encoded = encode(Conversation(turns), processor, images=[store.key("1.png")], max_length=2048)

    Args:
        conversation: the turns, with one `<image>` per image.
        processor: tokenizer, template and image settings of the model.
        images: key of each image, in order.
        sizes: width and height of each image; needed only where `processor.has_variable_images`.
        max_length: largest number of tokens, images included; text is cut at the end, images never. None: no limit.
        image_counts_as_one: count each image as one token of `max_length`, as LLaVA-Rad truncated its rows.

    Raises:
        DataError: placeholders and images differ in number, or the images alone do not fit.
    """
    segments = processor.template.render(place_images(conversation, processor))
    draft = tokenize_segments(segments, processor, sizes)
    _check_images(draft, processor, images)
    if max_length is not None and image_counts_as_one:
        max_length += sum(stop - start - 1 for start, stop in draft.image_spans)
    return _finish(draft, images, max_length, kept_sizes(processor, sizes))


def kept_sizes(processor: LlavaMedProcessor, sizes: Sequence[Size] | None) -> tuple[Size, ...]:
    """Return the image sizes that `Encoded` stores: none where all images have the same number of tokens."""
    return tuple(sizes) if processor.has_variable_images and sizes is not None else ()


def encode_prompt(
    conversation: Conversation,
    processor: LlavaMedProcessor,
    *,
    images: Sequence[str] = (),
    sizes: Sequence[Size] | None = None,
) -> Encoded:
    """Return the prompt of a conversation that ends with a question; no token is trained.

    Raises:
        DataError: it does not end with a question, or placeholders and images differ in number.
    """
    segments = processor.template.open(place_images(conversation, processor))
    draft = tokenize_segments(segments, processor, sizes)
    _check_images(draft, processor, images)
    return _finish(draft, images, None, kept_sizes(processor, sizes))


def place_images(conversation: Conversation, processor: LlavaMedProcessor) -> Conversation:
    """Return the conversation with the image placeholders where the model was trained to see them."""
    if processor.placement == "as_written":
        return conversation
    return replace(conversation, turns=tuple(_to_front(turn) for turn in conversation.turns))


def _to_front(turn: Turn) -> Turn:
    if IMAGE_TOKEN not in turn.text:
        return turn
    text = turn.text.replace(IMAGE_TOKEN, "").strip()
    return replace(turn, text=(f"{IMAGE_TOKEN}\n" * turn.text.count(IMAGE_TOKEN) + text).strip())


def tokenize_segments(
    segments: Sequence[Segment], processor: LlavaMedProcessor, sizes: Sequence[Size] | None = None
) -> Draft:
    """Return the tokens of rendered segments, images expanded; `sizes` as for `encode`."""
    text = "".join(segment.text for segment in segments)
    starts = list(accumulate((len(segment.text) for segment in segments), initial=0))[:-1]
    draft = Draft()
    for token in processor.text.bos_ids:
        draft.add(token, (0, 0), turn=-1)
    position = 0
    pieces = text.split(IMAGE_TOKEN)
    counts = _counts(len(pieces) - 1, processor, sizes)
    for index, piece in enumerate(pieces):
        if index:
            turn = segments[bisect_right(starts, position) - 1].turn
            start = len(draft.ids)
            for _ in range(counts[index - 1]):
                draft.add(processor.image_token_id, (position, position + len(IMAGE_TOKEN)), turn=turn, in_block=True)
            draft.image_spans.append((start, len(draft.ids)))
            position += len(IMAGE_TOKEN)
        before, body, after, skipped = _wrap(
            piece, processor, after_image=index > 0, before_image=index < len(pieces) - 1
        )
        tokens = processor.text(before + body + after)
        shift = position + skipped - len(before)
        low, high = position + skipped, position + skipped + len(body)
        for token, (start, stop) in zip(tokens.ids, tokens.spans, strict=True):
            inside = low <= start + shift < high
            # Markers are not in the rendered text: they get the edge of the text that they were added to.
            first = min(max(start + shift, low), max(high - 1, low))
            segment = segments[bisect_right(starts, first) - 1]
            last = min(max(stop + shift, first), high) if inside else first
            draft.add(token, (first, last), turn=segment.turn, trained=inside and segment.trained)
        position += len(piece)
    _protect_markers(draft, processor)
    if draft.trained:
        draft.trained[0] = False  # no token before it could predict it
    return draft


def _counts(num_places: int, processor: LlavaMedProcessor, sizes: Sequence[Size] | None) -> list[int]:
    """Return the number of tokens of each placeholder."""
    # A wrong number of images is reported later, by `_check_images`, whose message is clearer.
    if sizes is not None and len(sizes) != num_places:
        return [1] * num_places
    return processor.count_image_tokens(num_places, sizes)


def _wrap(
    piece: str, processor: LlavaMedProcessor, *, after_image: bool, before_image: bool
) -> tuple[str, str, str, int]:
    """Return end marker, text, start marker and the number of characters dropped at the front of the text."""
    body, skipped = piece, 0
    if processor.strip_around_images and after_image:
        body = piece.lstrip()
        skipped = len(piece) - len(body)
    if processor.strip_around_images and before_image:
        body = body.rstrip()
    if not processor.use_im_start_end:
        return "", body, "", skipped
    return IM_END_TOKEN if after_image else "", body, IM_START_TOKEN if before_image else "", skipped


def _protect_markers(draft: Draft, processor: LlavaMedProcessor) -> None:
    """Mark the start and end markers around each image as part of its block."""
    if not processor.use_im_start_end:
        return
    start_id, end_id = processor.marker_ids
    for start, stop in draft.image_spans:
        if start > 0 and draft.ids[start - 1] == start_id:
            draft.in_block[start - 1] = True
        if stop < len(draft.ids) and draft.ids[stop] == end_id:
            draft.in_block[stop] = True


def _check_images(draft: Draft, processor: LlavaMedProcessor, images: Sequence[str]) -> None:
    found = len(draft.image_spans)
    if found != len(images):
        raise DataError(
            f"the conversation has {found} {IMAGE_TOKEN} placeholders but {len(images)} images are given; "
            f"write exactly one {IMAGE_TOKEN} per image"
        )
    if draft.ids.count(processor.image_token_id) != sum(stop - start for start, stop in draft.image_spans):
        token = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
        raise DataError(f"the text itself contains {token}, which is reserved for image tokens; remove it")


def kept_tokens(draft: Draft, max_length: int | None) -> Sequence[int]:
    """Return the indices of the tokens that fit into `max_length`: all image blocks, and the first text.

    Raises:
        DataError: the images alone leave no room for text.
    """
    total, num_blocked = len(draft.ids), sum(draft.in_block)
    if max_length is None or total <= max_length:
        return range(total)
    budget = max_length - num_blocked
    if budget < 1:
        raise DataError(
            f"{len(draft.image_spans)} images take {num_blocked} tokens, which leaves no text within the maximum "
            f"length of {max_length}; raise --model-max-length above {num_blocked} or use fewer tokens per image"
        )
    num_text = accumulate(not blocked for blocked in draft.in_block)
    return [t for t, seen in enumerate(num_text) if draft.in_block[t] or seen <= budget]


def _finish(draft: Draft, images: Sequence[str], max_length: int | None, sizes: tuple[Size, ...]) -> Encoded:
    """Return the draft as an `Encoded`, cut to `max_length` tokens."""
    keep = kept_tokens(draft, max_length)
    places = {old: new for new, old in enumerate(keep)}
    return Encoded(
        input_ids=tuple(draft.ids[t] for t in keep),
        labels=tuple(draft.ids[t] if draft.trained[t] else IGNORE_INDEX for t in keep),
        turns=tuple(draft.turns[t] for t in keep),
        image_spans=tuple((places[start], places[stop - 1] + 1) for start, stop in draft.image_spans),
        images=tuple(images),
        num_cut=len(draft.ids) - len(keep),
        image_sizes=sizes,
    )
