"""lm-eval model that runs the common prefix of requests once: multiple-choice questions, few-shot examples.

``HFLM`` runs context and continuation of every answer, with logits at every position. ``PrefixLM`` runs a common prefix
once, reuses its keys and values for all answers, and computes logits for the answers' tokens only. Log-likelihoods
agree up to rounding.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from hfprune.models import backbone, output_head
from hfprune.utils.errors import ConfigError

Request = tuple[Any, list[int], list[int]]
"""Identifier, token ids of the context, token ids of the continuation."""

Answer = tuple[float, bool]
"""Log-likelihood of the continuation, and whether greedy decoding generates it."""


@dataclass(frozen=True, slots=True)
class Row:
    """Sequence to score.

    Attributes:
        ids: Token ids of context and continuation.
        targets: Number of scored tokens at the end.
    """

    ids: list[int]
    targets: int

    @property
    def sharable(self) -> int:
        """Number of tokens that can belong to a prefix: all before the token that predicts the first target."""
        return len(self.ids) - self.targets - 1


def share_prefixes(rows: Sequence[Row]) -> Iterator[tuple[int, list[int]]]:
    """Yields groups of consecutive rows with a common prefix, as (prefix tokens, row numbers).

    A row joins the previous group if this does not increase the number of tokens to run.

    >>> rows = [Row([1, 2, 3, 4, 5], 1), Row([1, 2, 3, 4, 6], 1), Row([7, 8, 9], 1)]
    >>> list(share_prefixes(rows))
    [(3, [0, 1]), (1, [2])]
    """
    group: list[int] = []
    shared = 0
    for number, row in enumerate(rows):
        if group:
            common = _common(rows[group[0]].ids, row.ids, min(shared, row.sharable))
            if common and (shared - common) * len(group) <= common:
                shared = common
                group.append(number)
                continue
            yield shared, group
        group, shared = [number], row.sharable
    if group:
        yield shared, group


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    return next((i for i in range(most) if a[i] != b[i]), most)


class PrefixLM(HFLM):  # type: ignore[misc]
    """``HFLM`` of a loaded model of a supported class, with shared prefixes.

    Args:
        model: A supported Hugging Face causal LM.
        tokenizer: Its tokenizer.
        batch_size: Number of answers with a common prefix per forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        longest = max((len(rest) for _, _, rest in requests), default=0)
        if longest > self.max_length:
            raise ConfigError(f"An answer of {longest} tokens exceeds the model's maximum of {self.max_length} tokens.")
        rows = [Row((context + rest)[-(self.max_length + 1) :], len(rest)) for _, context, rest in requests]
        answers: list[Answer | None] = [None] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for shared, numbers in share_prefixes(rows):
                for number, answer in self._answer_group(rows, shared, numbers):
                    answers[number] = answer
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update(len(numbers))
        assert all(answer is not None for answer in answers)
        return answers  # type: ignore[return-value]

    def _answer_group(self, rows: Sequence[Row], shared: int, numbers: list[int]) -> Iterator[tuple[int, Answer]]:
        if len(numbers) == 1:
            shared = 0
        base, cache = backbone(self.model), None
        if shared:
            prefix = torch.tensor([rows[numbers[0]].ids[:shared]], device=self.device)
            cache = base(input_ids=prefix, use_cache=True).past_key_values
        numbers = sorted(numbers, key=lambda n: len(rows[n].ids))  # little padding
        size = int(self.batch_size)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield from zip(part, self._score([rows[n] for n in part], shared, cache), strict=True)

    def _score(self, rows: Sequence[Row], shared: int, cache: Any) -> Iterator[Answer]:
        """Yields the answers of rows that continue the cached prefix."""
        tails = [row.ids[shared:-1] for row in rows]
        longest = max(map(len, tails))
        ids = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], device=self.device)
        past = None
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(rows))
        # right padding is not visible to the scored tokens
        hidden = backbone(self.model)(input_ids=ids, past_key_values=past, use_cache=past is not None).last_hidden_state
        head = output_head(self.model)
        for row, tail, states in zip(rows, tails, hidden, strict=True):
            targets = torch.tensor(row.ids[-row.targets :], device=self.device)
            yield _answer(head.logits(states[len(tail) - row.targets : len(tail)]), targets)


def _answer(logits: Tensor, targets: Tensor) -> Answer:
    """Returns the log-likelihood of ``targets`` [T] under ``logits`` [T, V], and whether each is the most likely."""
    log_probs = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)
    return float(log_probs.sum()), bool((logits.argmax(-1) == targets).all())
