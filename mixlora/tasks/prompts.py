"""The one formatter that training and evaluation share."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mixlora.config.schema import Data, Style, Template
from mixlora.errors import ConfigError
from mixlora.tasks.example import Example

USER, ASSISTANT = "\u0001user text\u0001", "\u0001assistant text\u0001"


@dataclass(frozen=True)
class Encoded:
    prompt_ids: list[int]
    answer_ids: list[int]
    cut: int = 0


class Formatter:
    def __init__(self, tokenizer: Any, data: Data):
        self.tokenizer, self.data = tokenizer, data
        has = bool(getattr(tokenizer, "chat_template", None))
        if data.template is Template.chat and not has:
            raise ConfigError("data.template=chat, but this model's tokenizer has no chat template. Use data.template=plain")
        self.chat = has and data.template is not Template.plain
        if self.chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": USER}], add_generation_prompt=True, tokenize=False)
            before, after = text.split(USER)
            full = tokenizer.apply_chat_template(
                [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}], tokenize=False
            )
            self.texts = (before, after, full.partition(ASSISTANT)[2].strip())
            self.prefix, self.suffix, self.end = (self.control(t) for t in self.texts)

    def control(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def user(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt(self, example: Example, room: int | None) -> list[int]:
        ids = self.user(self.question(example))
        if self.chat:
            if room is not None:
                ids = ids[-max(room - len(self.prefix) - len(self.suffix), 1) :]
            return [*self.prefix, *ids, *self.suffix]
        return ids if room is None else ids[-room:]

    def question(self, example: Example) -> str:
        lines = [example.question]
        if self.data.style is Style.letters and example.options:
            lines += [f"{chr(65 + i)}. {option}" for i, option in enumerate(example.options)]
        return "\n".join(lines) if self.chat else "\n".join(lines) + "\nAnswer:"

    def answers(self, example: Example) -> list[str]:
        if self.data.style is Style.letters and example.options:
            return [chr(65 + i) for i in range(len(example.options))]
        return list(example.options)

    def text_ids(self, text: str) -> list[int]:
        return self.user(text if self.chat else " " + text)

    def encode(self, example: Example, *, max_length: int) -> Encoded:
        answer = example.answer if not example.options else self.answers(example)[example.gold or 0]
        end = self.end if self.chat else [self.tokenizer.eos_token_id]
        answer_ids = [*self.text_ids(answer), *end]
        return Encoded(self.prompt(example, max_length - len(answer_ids)), answer_ids)

    def continuations(self, example: Example, *, max_length: int) -> tuple[list[int], list[list[int]], list[str]]:
        texts = self.answers(example)
        options = [self.text_ids(text) for text in texts]
        return self.prompt(example, max_length - max(map(len, options))), options, texts

    def generation_prompt(self, example: Example, *, max_length: int) -> list[int]:
        return self.prompt(example, max_length)

    def fingerprint(self) -> str:
        parts = [self.texts if self.chat else "plain", self.data.style.value]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
