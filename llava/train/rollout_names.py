"""Options of Dr-LLaVA's original command that are named differently here; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

ROLLOUT_ALIASES = {
    "--dataset_path": "--data_path",
    "--total_epochs": "--num_train_epochs",
    "--policy_model_name_or_path": "--model_name_or_path",
    "--base_model_name": "--model_name_or_path",
}
"""Our name of each option."""


def translated(words: Sequence[str]) -> list[str]:
    """Return a command line in which options of the original command have our names.

    With a policy the base model is left out: the policy is trained, and names its base. `--resume-from-training False`
    starts over.
    """
    found: list[str] = []
    has_policy = any(_name(word) == "--policy_model_name_or_path" for word in words)
    position = 0
    while position < len(words):
        word, name = words[position], _name(words[position])
        _, equals, value = word.partition("=")
        position += 1
        if name == "--resume_from_training" or (name == "--base_model_name" and has_policy):
            if not equals:
                value = next(iter(words[position : position + 1]), "")
                position += 1
            if name == "--resume_from_training" and value.lower() == "false":
                found += ["--resume_from_checkpoint", "False"]
        else:
            found.append(ROLLOUT_ALIASES[name] + equals + value if name in ROLLOUT_ALIASES else word)
    return found


def _name(word: str) -> str:
    """Return the option of a word with underscores; a word that is none is returned as it is."""
    return "--" + word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else word
