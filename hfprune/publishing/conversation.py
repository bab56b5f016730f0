"""Conversations: a model answers prompts, with its chat template where the tokenizer has one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfprune.io.load import max_positions
from hfprune.models.contexts import inference
from hfprune.utils.errors import ConfigError


@dataclass(kw_only=True)
class Conversation:
    """A model, its tokenizer, and what was said so far.

    Attributes:
        model: A Hugging Face causal LM, or PEFT's model around one.
        tokenizer: Its tokenizer.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling; 0 takes the most likely token each time.
        seed: Seed of sampling.
        system: System message; only with a chat template.
        turns: What was said; only with a chat template, without one every prompt is continued alone.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for a setting that cannot be used."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} is not positive.")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} is negative.")
        if self.system is not None and not self.has_template:
            raise ConfigError("system=... needs a chat template, and this model's tokenizer has none.")

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def reply(self, prompt: str) -> str:
        """Returns the model's answer to a prompt, or its continuation where there is no chat template.

        Args:
            prompt: What is said; with a chat template the earlier turns come before it.

        Raises:
            ConfigError: The prompt is empty, or it leaves no position for an answer.
        """
        ids, turns = self._encoded(prompt)
        limit = max_positions(self.model.config)
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - ids.shape[1])
        if not ids.shape[1] or room < 1:
            most = "" if limit is None else f", and at most {limit} with the answer"
            raise ConfigError(f"The prompt has {ids.shape[1]} tokens; the model takes at least 1{most}.")
        sampled = {"do_sample": self.temperature > 0, "temperature": self.temperature or None}
        sampled |= {"top_p": None, "top_k": None}
        ends = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in ends if token is not None)
        ids = ids.to(next(self.model.parameters()).device)
        with torch.random.fork_rng(), inference(self.model):
            torch.manual_seed(self.seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=pad,
                **sampled,
            )
        answer: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        if self.has_template:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer.strip()

    def _encoded(self, prompt: str) -> tuple[Tensor, list[dict[str, str]]]:
        """Returns the token ids [1, T] that are read, and the turns that they hold."""
        if not self.has_template:
            return self.tokenizer(prompt, return_tensors="pt").input_ids, []
        start = [{"role": "system", "content": self.system}] if self.system is not None and not self.turns else []
        turns = [*(self.turns or start), {"role": "user", "content": prompt}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises what the template asks for
            raise ConfigError(f"The chat template refuses this conversation: {error}") from error
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids, turns
