"""Forward passes of one mixture of experts, and the same tokens routed to fewer experts.

Shape legend: N tokens, E experts, K experts per token, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfprune.models.contexts import hooked
from hfprune.models.experts import FewerExperts, by_token, takes_scaled_tokens


@dataclass(frozen=True, slots=True)
class MixturePass:
    """One forward pass of a mixture.

    Attributes:
        router: The router.
        router_args: Its positional arguments.
        router_output: Its output.
        args: Positional arguments of the experts module.
        output: Its output, [N, H]; [E N, H] where it returns one output for each expert (Llama 4).
    """

    router: Any
    router_args: tuple[Any, ...]
    router_output: tuple[Tensor, ...]
    args: tuple[Any, ...]
    output: Tensor

    @property
    def logits(self) -> Tensor:
        """Router logits, [N, E]."""
        return self.router_output[0 if len(self.router_output) == 3 else 1]

    def restricted(self, keep: Sequence[int]) -> tuple[Any, ...]:
        """Returns the arguments of the experts module if the router chooses among the experts ``keep`` only."""
        found = FewerExperts(keep)(self.router, self.router_args, self.router_output)
        if not takes_scaled_tokens(self.args):
            return self.args[0], found[2], found[1]
        hidden, scores = self.router_args[0], found[0]
        return ((scores.T.unsqueeze(-1) * hidden.reshape(1, -1, hidden.shape[-1])).flatten(0, 1),)

    def summed(self, experts: Any, output: Tensor) -> Tensor:
        """Returns an output of the experts module summed over experts, [N, H]."""
        return by_token(experts, output).sum(1) if takes_scaled_tokens(self.args) else output


@contextmanager
def mixture_passes(router: Any, experts: Any, visit: Callable[[MixturePass], None]) -> Iterator[None]:
    """Context in which ``visit`` receives every forward pass of a mixture.

    Args:
        router: The router, which runs before the experts.
        experts: The experts module.
        visit: Function that receives a pass after the experts ran.
    """
    seen: list[tuple[tuple[Any, ...], tuple[Tensor, ...]]] = []

    def routed(_: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        seen.append((args, output))

    def ran(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        router_args, router_output = seen.pop()
        visit(MixturePass(router, router_args, router_output, args, output))

    with hooked([router.register_forward_hook(routed), experts.register_forward_hook(ran)]):
        yield
