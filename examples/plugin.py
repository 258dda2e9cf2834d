"""A plug-in with a template, projector, metric, task, converter and objective: `--plugin examples/plugin.py`."""

import csv

import torch
from torch import nn

from llava import plugins
from llava.data.flat_batch import target_logits
from llava.train.losses import edge_sum, token_logprobs, without_token
from llava.train.objectives.base import divided
from llava.train.objectives.sft import SFT

# The text around questions and answers; what is marked True is trained.
FORM = plugins.Form(
    system=f"{plugins.SLOT}\n",
    human=((f"Clinician: {plugins.SLOT}\n", False),),
    gpt=(("Report:", False), (f" {plugins.SLOT}</s>", True), ("\n", False)),
)
plugins.add_template(plugins.ConversationTemplate("clinic", "Describe the image.", FORM, stops=("</s>",)))


class TwoLayers(nn.Module):
    """Two linear layers around a ReLU."""

    def __init__(self, vision: int, text: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(vision, text), nn.Linear(text, text)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(features)))


def two_layers_shapes(vision: int, text: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, so that doctor, convert and export know them."""
    first = {"first.weight": (text, vision), "first.bias": (text,)}
    return first | {"second.weight": (text, text), "second.bias": (text,)}


FORM_THERE = plugins.TransformersForm("first.", "second.", "relu")
plugins.add_projector("two-layers", TwoLayers, two_layers_shapes, transformers=FORM_THERE)


def brevity(items):
    """1 for an answer that is not longer than its reference."""
    return [float(len(item.prediction.split()) <= len(item.reference.split())) for item in items]


plugins.add_metric(plugins.Metric("brevity", brevity, plugins.MetricFacts(version="1")))
plugins.add_task(plugins.EvaluationTask("clinic", "clinic/test.json", "clinic/images", metrics=("brevity", "open f1")))


def rows_of_csv(path):
    """Rows of a table with the columns image, question and answer."""
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"])]
            conversation = [{"from": role, "value": text} for role, text in turns]
            yield {"id": f"clinic-{number}", "image": row["image"], "conversations": conversation}


plugins.add_converter("clinic", rows_of_csv, summary="convert a table of questions to rows (a plug-in)")


class Focal(SFT):
    """Fine-tuning in which tokens that are predicted well count less."""

    metric_names = ()

    def __call__(self, model, batch, *, num_items):
        nll = -token_logprobs(without_token(target_logits(model, batch), self.without), batch.target_ids)
        loss = (1 - (-nll).exp()) ** 2 * nll
        return divided(edge_sum(loss, batch.edge_target, batch.edge_weight)[None], num_items)


plugins.add_objective("focal", Focal)
