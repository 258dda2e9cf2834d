"""Episode: the unfinished dialogue of one script, which keeps its slot from turn to turn.

prompt --answer--> ids are kept, end token, next question --answer--> ... --> one `Encoded` with the action mask
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from llava.data.encode import Encoded
from llava.errors import ConfigError
from llava.generation.held import FollowUp, with_answer, with_question
from llava.generation.protocol import Completion, Dialogue, Finish, Sampling
from llava.generation.request import PromptSource, Request
from llava.generation.sampling import TokenDraw
from llava.generation.stopping import AnswerText


def check_dialogue(sampling: Sampling) -> None:
    """Refuse sampling that dialogues do not support.

    Raises:
        ConfigError: names the setting.
    """
    if sampling.num_beams != 1:
        raise ConfigError(f"a dialogue needs num_beams=1, got {sampling.num_beams}")
    if sampling.logprobs and sampling.temperature > 0.0 and (sampling.top_p < 1.0 or sampling.top_k > 0):
        raise ConfigError(
            f"log-probabilities of a dialogue are those of the whole distribution, but top_p={sampling.top_p} and "
            f"top_k={sampling.top_k} sample from a part of it; use top_p=1 and top_k=0"
        )
    if sampling.logprobs and sampling.repetition_penalty != 1.0:
        raise ConfigError(
            "log-probabilities of a dialogue are those of the logits of the model, but tokens are sampled from others "
            f"with repetition_penalty={sampling.repetition_penalty}; use repetition_penalty=1, or logprobs=False"
        )
    if sampling.top_logprobs:
        raise ConfigError(f"a dialogue has no likeliest tokens; use top_logprobs=0, got {sampling.top_logprobs}")


class Episode(Request):
    """Request of a dialogue; `token_ids` and `logprobs` are those of its present answer."""

    def __init__(
        self,
        source: PromptSource,
        sampling: Sampling,
        draw: TokenDraw,
        text: AnswerText,
        *,
        follow_ups: Sequence[FollowUp],
        max_tokens: int,
    ) -> None:
        """Create the episode before its first question is prefilled.

        Args:
            source: the prompt that ends with the first question.
            sampling: how every answer is sampled.
            draw: random stream of all answers.
            text: text of an answer.
            follow_ups: the questions that follow.
            max_tokens: largest number of tokens of the whole dialogue.
        """
        super().__init__(source, sampling, draw, text, is_dialogue=True)
        self.follow_ups = deque(follow_ups)
        self.max_tokens = max_tokens
        self.texts: list[str] = []
        self.finishes: list[Finish] = []
        self.turn_logprobs: list[tuple[float, ...]] = []
        self.error: str | None = None
        self.num_turns = len(follow_ups) + 1

    def fail(self, reason: str, cause: Exception | None = None) -> None:
        """End the dialogue; earlier answers are kept."""
        self.error = reason
        super().fail(reason, cause)

    def dialogue(self) -> Dialogue:
        """Return the dialogue so far; missing answers have finish `error`."""
        missing = self.num_turns - len(self.texts)
        finishes: list[Finish] = [*self.finishes, *["error"] * missing]  # type: ignore[list-item]
        return Dialogue(
            self.encoded or Encoded((), (), ()),
            (*self.texts, *[""] * missing),
            tuple(finishes),
            (*self.turn_logprobs, *[()] * missing),
            self.error,
        )

    def _finish(self, finish: Finish) -> None:
        """Record the answer, then queue the next question or end."""
        assert self.encoded is not None
        answer = tuple(self.token_ids)
        self.texts.append(self.text.final(answer))
        self.finishes.append(finish)
        self.turn_logprobs.append(tuple(self.logprobs))
        self.encoded = with_answer(self.encoded, answer)
        self.token_ids, self.logprobs = [], []
        if not self.follow_ups:
            return self._end(answer, finish)
        asked = with_question(self.encoded, self.follow_ups.popleft(), ends=self.text.rule.token_ids)
        room = self.max_tokens - len(asked.input_ids)
        if room < 1:
            self.error = (
                f"answer {len(self.texts)} has no room: the dialogue before it is {len(asked.input_ids)} tokens long, "
                f"but at most {self.max_tokens - 1} fit the model and leave room for an answer; use fewer or shorter "
                "turns"
            )
            return self._end(answer, finish)
        question = asked.input_ids[len(self.encoded.input_ids) :]
        self.encoded = asked
        self.limit = min(self.sampling.max_new_tokens, room)
        self.pending = (answer[-1], *question)

    def _end(self, answer: tuple[int, ...], finish: Finish) -> None:
        self.source.release()
        self.completion = Completion(self.texts[-1], answer, finish)
