"""Tokenize conversations into ids and labels; all tokenization happens here.

    Conversation --template--> segments --tokenize_segments--> Draft --truncate--> Encoded

The rendered text is split at its image placeholders and each piece is tokenized separately, as the published models
were trained: begin-of-text once, then piece, image, piece, ... A token is trained when the character at which it starts
lies in a trained segment; token counts are not used, and no text is tokenized twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from llava.chat_template import Segment
from llava.constants import IGNORE_INDEX, IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.errors import ConfigError, DataError
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
        weight: weight of the sequence; a preference loss multiplies the loss of a pair by that of its chosen side.
        numbers: named numbers of the sequence, for example the log-probability under a reference model.
        columns: named numbers of its tokens, [T] each, for example advantages; those of trained tokens are used.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[int, ...]
    image_spans: tuple[tuple[int, int], ...] = ()
    images: tuple[str, ...] = ()
    num_cut: int = 0
    image_sizes: tuple[Size, ...] = ()
    source: int = 0
    weight: float = 1.0
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict, hash=False)


Unit = tuple[Encoded, ...]
"""Sequences that belong together: one for fine-tuning, two for a preference pair, G samples of one prompt.

A unit is never split over rows, and batch sizes count units."""


def as_unit(row: Encoded | Unit) -> Unit:
    """Return a data row as a unit; one sequence is a unit of its own."""
    return (row,) if isinstance(row, Encoded) else row


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

    >>> from llava.samples import Turn
    >>> turns = (Turn("human", "<image>\\nWhat is shown?"), Turn("gpt", "A lung."))
    >>> encoded = encode(Conversation(turns), processor, images=["1.png"], max_length=2048)
    >>> trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    >>> processor.tokenizer.decode(trained)
    ' A lung.</s>'

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


def num_learned(encoded: Encoded, conversation: Conversation) -> int:
    """Return the number of trained tokens in answers and questions; 0 if nothing is trained.

    The `###` of the "v0" family before a question is trained too, but does not count.
    """
    taught = {index for index, turn in enumerate(conversation.turns) if turn.role == "gpt" or turn.train}
    pairs = zip(encoded.labels, encoded.turns, strict=True)
    return sum(label != IGNORE_INDEX and turn in taught for label, turn in pairs)


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
    """Return the prompt of a conversation; no token is trained.

    The model continues it with an answer, or, after an answer, with a question of its own.

    Raises:
        DataError: it ends with an answer and the template cannot ask, or placeholders and images differ in number.
    """
    segments = processor.template.open(place_images(conversation, processor))
    draft = tokenize_segments(segments, processor, sizes)
    _check_images(draft, processor, images)
    return _finish(draft, images, None, kept_sizes(processor, sizes))


def encode_rendered(
    text: str, processor: LlavaMedProcessor, *, images: Sequence[str] = (), sizes: Sequence[Size] | None = None
) -> Encoded:
    """Return the tokens of an already rendered prompt, which is used as it is.

    Raises:
        DataError: it is empty, or placeholders and images differ in number.
    """
    draft = tokenize_segments([Segment(text, False, 0)], processor, sizes)
    if not draft.ids:
        raise DataError("the prompt is empty; expected text")
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
    """Return end marker, text, start marker, and the number of characters dropped at the text's start."""
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


def continuation(encoded: Encoded, question: str, processor: LlavaMedProcessor) -> tuple[int, ...]:
    """Return the template's ids from the end of an answer to the header of the next one.

    Tokens that a model wrote are kept as they are: nothing before the question is tokenized again.

    Args:
        encoded: a conversation that ends with an answer; the ids begin with its end token if the answer has none.
        question: the next question, without an image.
        processor: processor of the model.

    Raises:
        ConfigError: answers of this template do not end with a token of their own.
        DataError: the question has an image, or contains a special token that ends answers.
    """
    ids = tuple(token for token, _ in follow_up(question, processor))
    return ids[1:] if encoded.input_ids and encoded.input_ids[-1] in processor.stop_token_ids else ids


def follow_up(question: str, processor: LlavaMedProcessor) -> tuple[tuple[int, int], ...]:
    """Return end token, question and answer header as `(id, turn)`.

    Turn 0 is the answer before, turn 2 the next one.

    Raises:
        ConfigError, DataError: as `continuation`.
    """
    if IMAGE_TOKEN in question:
        raise DataError(f"a follow-up question contains {IMAGE_TOKEN}; show all images with the first question")
    template = processor.template
    # Before and after a special token, text is tokenized independently, so any answer serves to find what follows it.
    turns = (Turn("human", "x"), Turn("gpt", "x"), Turn("human", question))
    encoded = encode_prompt(Conversation(turns), processor)
    ends = [
        place
        for place, (token, turn) in enumerate(zip(encoded.input_ids, encoded.turns, strict=True))
        if turn >= 1 and token in processor.stop_token_ids
    ]
    if not any(encoded.turns[place] == 1 for place in ends):
        raise ConfigError(
            f"template {template.name!r} ends an answer with the text {template.stops[0]!r}, not with a token of its "
            "own, so generated tokens cannot be continued; use a template whose end mark is a token of this tokenizer, "
            "such as chatml (<|im_end|>) or vicuna_v1 (</s>)"
        )
    if any(token in processor.stop_token_ids for token in processor.text(question).ids):
        raise DataError("a follow-up question contains a token that ends answers; remove it")
    start = next(place for place in ends if encoded.turns[place] == 1)
    return tuple(zip(encoded.input_ids[start:], (turn - 1 for turn in encoded.turns[start:]), strict=True))
