"""What a model writes: greedy continuations of a few prompts."""

from typing import Any

import torch
from torch import Tensor

from hfprune.evaluation.hidden import inference

PROMPT_TOKENS = 32
NEW_TOKENS = 48


def continuations(
    model: Any, tokenizer: Any, windows: Tensor, *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS
) -> list[tuple[str, str]]:
    """Returns a prompt and its greedy continuation for each window.

    Args:
        model: A Hugging Face causal LM.
        tokenizer: Its tokenizer.
        windows: [N, W] token ids; the first half of a window at most is its prompt.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to write, fewer where the text ends.
    """
    prompt_tokens = min(prompt_tokens, max(1, windows.shape[1] // 2))
    new_tokens = min(new_tokens, max(1, windows.shape[1] - prompt_tokens))  # a window fits the model's positions
    device = next(model.parameters()).device
    found = []
    for window in windows:
        ids = window[None, :prompt_tokens].to(device)
        with inference(model):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=_pad(tokenizer),
            )
        found.append((tokenizer.decode(ids[0]), tokenizer.decode(out[0, prompt_tokens:], skip_special_tokens=True)))
    return found


def _pad(tokenizer: Any) -> int:
    """Returns an id for padding, which a single prompt never needs: without one generate() warns."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))
