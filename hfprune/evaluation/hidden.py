"""Final hidden states of evaluation windows: one forward pass from which perplexity and fidelity both follow.

They are small ([N, W, D]; 24 MB for 20k tokens of a 576-wide model), so that no [T, V] logits need to be kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hfprune.arch import backbone


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags return at the end."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


def final_hidden(model: nn.Module, windows: Tensor, *, batch_size: int = 1) -> Tensor:
    """Returns the final hidden states [N, W, D] of ``windows`` [N, W], on the CPU, in the model's dtype.

    Args:
        model: A supported Hugging Face causal LM.
        windows: Token ids, int64, no padding.
        batch_size: Windows per forward pass.
    """
    device = next(model.parameters()).device
    base = backbone(model)
    with inference(model):
        parts = [
            base(input_ids=part.to(device), use_cache=False).last_hidden_state.cpu()
            for part in windows.split(batch_size)
        ]
    return torch.cat(parts)
