"""Chat templates of current language model families, for base models whose tokenizer has none.

Each is the text of a plain conversation without tools. A tokenizer's own template (`--version auto`) is preferred.
"""

from __future__ import annotations


def _family(
    user: str,
    header: str,
    end: str,
    *,
    system: str,
    no_system: str = "",
    start: str = "",
    lead: str = "",
    trim: bool = False,
) -> str:
    """Return a Jinja template.

    Args:
        user: text around a question, with `{}` for it.
        header: text before an answer, with which a prompt ends.
        end: text after an answer, which is trained.
        system: text around the system prompt, with `{}` for it.
        no_system: text instead of it without a system prompt.
        start: expression of the text before everything.
        lead: trained text in front of an answer.
        trim: whether white space around texts is removed.
    """
    content = "message['content'] | trim" if trim else "message['content']"
    return (
        (f"{{{{ {start} }}}}" if start else "")
        + "{% if messages[0]['role'] == 'system' %}{% set message = messages[0] %}"
        + _around(system, content)
        + "{% set messages = messages[1:] %}{% else %}"
        + _around(no_system, content)
        + "{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        + _around(header, content)
        + "{% generation %}"
        + _around(f"{lead}{{}}{end}", content)
        + "{% endgeneration %}{% else %}"
        + _around(user, content)
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + _around(header, content)
        + "{% endif %}"
    )


def _around(text: str, content: str) -> str:
    """Return text as Jinja expressions, with `{}` for the content of the message."""
    parts = text.split("{}")
    written = [f"{{{{ {part!r} }}}}" if part else "" for part in parts]
    return f"{{{{ {content} }}}}".join(written)


def _marked(default_system: str) -> str:
    """Return a template with `<|im_start|>` and `<|im_end|>`."""
    system = "<|im_start|>system\n{}<|im_end|>\n"
    return _family(
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
        system=system,
        no_system=system.replace("{}", default_system) if default_system else "",
    )


FAMILIES: dict[str, str] = {
    "qwen2.5": _marked("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _marked(""),
    "smollm2": _marked("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "llama3": _family(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        start="bos_token",
        trim=True,
    ),
    "gemma3": (
        "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
        "{% generation %}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endgeneration %}"
        "{% else %}{{ '<start_of_turn>user\n' }}{{ first if loop.first else '' }}{{ message['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": _family(
        "<|user|>\n{}<|end|>\n", "<|assistant|>\n", "<|end|>\n", system="<|system|>\n{}<|end|>\n"
    ),
    "phi4": _family(
        "<|im_start|>user<|im_sep|>{}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
        system="<|im_start|>system<|im_sep|>{}<|im_end|>",
    ),
    "mistral": _family(
        "[INST] {}[/INST]", "", "</s>", system="[SYSTEM_PROMPT] {}[/SYSTEM_PROMPT]",
        start="bos_token", lead=" ",
    ),
}  # fmt: skip
"""Templates by name."""
