"""Context managers that change the state of a module temporarily: eval mode, frozen, hooked, inference."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Puts ``root`` into eval mode; the mode of every submodule is restored at the end."""
    training = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def inference(root: nn.Module) -> Iterator[None]:
    """Puts ``root`` into eval mode and disables gradients."""
    with evaluating(root), torch.no_grad():
        yield


@contextmanager
def frozen(root: nn.Module) -> Iterator[None]:
    """Freezes ``root`` and puts it into eval mode; both are restored at the end."""
    requires_grad = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    for parameter, _ in requires_grad:
        parameter.requires_grad_(False)
    try:
        with evaluating(root):
            yield
    finally:
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)


@contextmanager
def ordinary() -> Iterator[None]:
    """Context in which new modules are float32 on the CPU and run in their own type, also within another context.

    The state of torch's random numbers is the same at the end.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Removes hooks at the end.

    Args:
        handles: Handles returned by ``register_forward_hook`` and similar methods.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
