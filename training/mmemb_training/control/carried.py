"""Which questions a chat can carry: those whose words a server tokenises as we do.

A server renders a chat as one text, in which words that spell a marker become the marker, and line ends at the start of
a text join the one before it. Ours tokenises piece by piece, and never takes words for markers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmemb_deploy.inputs.prompts import THINK, PromptEncoder
from mmemb_deploy.reasoners.chat import text_part
from mmemb_training.checkpoint import CHAT_TEMPLATE
from mmemb_training.samples import Question


class Carried:
    """Tells of a question whether a server that holds the checkpoint's tokenizer and template reads our prompt."""

    def __init__(self, prompt: PromptEncoder) -> None:
        served = Tokenizer.from_str(prompt.tokenizer.to_str())
        served.encode_special_tokens = False
        self._prompt = prompt
        self._server: Any = PreTrainedTokenizerFast(
            tokenizer_object=served, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False
        )

    def __call__(self, question: Question) -> bool:
        """Return whether it does; nothing of the question but its words is read."""
        text, pictured = _words(question.content)
        instruction = self._prompt.format.asked(question.instruction)
        content = [text_part(f"{instruction}\n")] if instruction else []
        content += [{"type": "image"}] if pictured else []
        content += [text_part(text)] if text else []
        chat = [{"role": "system", "content": self._prompt.format.system}, {"role": "user", "content": content}]
        theirs = self._server.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ours = self._prompt.prompt(instruction, text, image_tokens=[1] * pictured)
        return list(theirs) == [*ours, self._prompt.ids[THINK]]


def _words(content: Any) -> tuple[str, bool]:
    """Return a content's text, and whether it also shows something, which stands before the text."""
    if isinstance(content, str):
        return content, False
    if not isinstance(content, Mapping):
        return "", True
    parts = cast("Mapping[str, Any]", content)
    return parts.get("text", ""), bool(parts.keys() - {"text"})
