"""Code and citation of a model card."""

from __future__ import annotations

from typing import Any

OURS = """```python
# pip install llava; run it beside the folder, or pass its path. xray.png is an image of yours.
from llava import api

assistant = api.load_predictor({name!r})
print(assistant.chat("What does the image show?", "xray.png", max_new_tokens=64))
```"""

TRANSFORMERS = """```python
# Run it beside the folder, or pass its path or hub name. xray.png is an image of yours.
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained({name!r})
model = LlavaForConditionalGeneration.from_pretrained({name!r})
content = [{{"type": "image"}}, {{"type": "text", "text": "What does the image show?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=Image.open("xray.png").convert("RGB"), text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""

PLUGINS = """# It needs the plug-in {plugin}, which comes from its author: a checkpoint loads no code.
from llava.plugins import load_plugins

load_plugins([{plugin!r}])
"""

CITATION = """Cite this software, and the papers of the systems, parts and data that the model builds on:

```bibtex
@software{llava_medical,
  title = {llava: medical vision-language assistants},
  author = {{The llava maintainers}},
  license = {Apache-2.0}
}
@article{li2023llavamed,
  title = {{LLaVA-Med}: Training a Large Language-and-Vision Assistant for Biomedicine in One Day},
  author = {Li, Chunyuan and others},
  journal = {arXiv:2306.00890},
  year = {2023}
}
```""".splitlines()


def code_cell(name: str, kind: str, config: Any) -> list[str]:
    """Return the lines of a cell that loads the model and asks a question.

    Args:
        name: name of the folder.
        kind: `hf` for transformers' format; any other is loaded by this package.
        config: the model's configuration.
    """
    if kind == "hf":
        return TRANSFORMERS.format(name=name).splitlines()
    lines = OURS.format(name=name).splitlines()
    for plugin in getattr(config, "plugins", None) or ():
        lines[2:2] = PLUGINS.format(plugin=plugin).splitlines()
    return lines
