"""Symbolic reward as a TRL reward function, for TRL's trainers and others with the same interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.symbolic.rubric import Priors, reward
from llava.symbolic.rules import RuleSet, load_rules


def symbolic_reward(
    rules: str | Path | RuleSet,
    *,
    preset: str | None = None,
    priors: Priors | None = None,
    eos_token_id: int | None = None,
) -> Callable[..., list[float]]:
    """Return a reward function for `reward_funcs` of TRL's GRPOTrainer and RLOOTrainer.

    Example::

        trainer = GRPOTrainer(model, reward_funcs=symbolic_reward("bone-marrow-aspirate"), train_dataset=rows)

    The rows need the columns `asked` and `truth` of `llava rules dialogues`, and for the length `references`. A
    completion is a text, the answer to one question, or a list of messages, whose assistant messages are the answers.

    Args:
        rules: rule file, name of a shipped rule set, or rules.
        preset: settings of the reward; None for those of the rule file.
        priors: counts of the true values, which switch balance on.
        eos_token_id: end token; a completion whose ids lack it is unfinished. None takes all as finished.
    """
    found = rules if isinstance(rules, RuleSet) else load_rules(rules)

    def rewards(completions: Sequence[Any], asked: Sequence[Any], truth: Sequence[Any], **columns: Any) -> list[float]:
        references = columns.get("references") or [None] * len(completions)
        ids = columns.get("completion_ids")
        totals = []
        for index, completion in enumerate(completions):
            answers = _answers(completion, num=len(asked[index]))
            finished = [True] * len(answers)
            if eos_token_id is not None and ids is not None:
                finished[-1] = eos_token_id in list(ids[index])
            totals.append(
                reward(
                    found,
                    truth=truth[index],
                    asked=asked[index],
                    answers=answers,
                    references=references[index],
                    finished=finished,
                    preset=preset,
                    priors=priors,
                ).total
            )
        return totals

    rewards.__name__ = f"symbolic_reward_{found.id}"  # names the metric in TRL's log
    return rewards


def _answers(completion: Any, *, num: int) -> list[str]:
    """Return the answers of a completion; questions after its end have empty ones.

    Raises:
        DataError: there are more answers than questions, or the completion has another form.
    """
    if isinstance(completion, str):
        answers = [completion]
    elif isinstance(completion, Sequence) and all(isinstance(turn, Mapping) for turn in completion):
        answers = [_text(turn.get("content")) for turn in completion if turn.get("role") == "assistant"]
    else:
        raise DataError(f"a completion is {type(completion).__name__}; expected a text or a list of messages")
    if len(answers) > num:
        raise DataError(f"a completion has {len(answers)} answers to {num} asked nodes; expected at most one each")
    return answers + [""] * (num - len(answers))


def _text(content: Any) -> str:
    """Return the text of a message, which may be a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or [] if isinstance(part, Mapping))
