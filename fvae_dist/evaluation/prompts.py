"""Prompt templates. Both are the alpaca prompt; they differ in white space, which a model notices.

clean: what this project's data format `alpaca` trains on (`fvae_dist.training.sources.alpaca_prompt`).
published: the evaluation prompt of LLM-Adapters (AGI-Edgerunners, `commonsense_evaluate.py`), as the LoRA papers use.
    There every line after the first is indented by 16 spaces, the prompt ends in such an indent, and the record's
    `input` is never shown. Its training prompt differs again (`published_prompt` of fvae_dist.training.sources: a
    comment at the end of the first line, indented empty lines): adapters trained with that code have never seen this
    exact prompt, and the published numbers were made like that.
"""

from __future__ import annotations

from typing import Literal

from fvae_dist.training.sources import alpaca_prompt

Template = Literal["clean", "published"]
TEMPLATES: tuple[Template, ...] = ("clean", "published")

_INDENT = " " * 16
_PUBLISHED_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
)


def render_prompt(template: str, instruction: str, input: str = "") -> str:
    """The prompt of one record, up to where the answer begins.

    Args:
        template: clean or published.
        instruction: of the record.
        input: of the record; `published` leaves it out, as that code does.
    """
    if template == "clean":
        return alpaca_prompt(instruction, input)
    return f"{_PUBLISHED_HEAD}{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n{_INDENT}### Response:\n{_INDENT}"
