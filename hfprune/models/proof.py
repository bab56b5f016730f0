"""Proof of an architecture table: every claim that the table makes about a class is checked on a tiny model of it.

A table that is wrong in one place prunes without an error and gives a worse model. The proof compares, in float64 and
for every group, the pruned model with the dense model whose removed units are silenced by hooks on the modules that
read them; a table, written by hand or derived, is used only for the unit kinds that pass.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hfprune.models import proof_checks as checks
from hfprune.models.groups import find_groups, pin_spec
from hfprune.models.proof_checks import Failed
from hfprune.models.spec import ArchSpec
from hfprune.utils.errors import HFPruneError, first_line

CLAIMS = (
    "head",
    "neurons",
    "heads",
    "experts",
    "layers",
    "channels",
    "config_reload",
    "keep_all",
    "packing",
    "padding",
)
"""What a proof shows, in the order of its report."""

KIND_CLAIMS = {"mlp": "neurons", "heads": "heads", "experts": "experts", "layers": "layers", "channels": "channels"}
"""Unit kind -> the claim that removing its units equals masking them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim about an architecture.

    Attributes:
        proven: Whether it holds on the tiny model.
        reason: Why not; empty if it holds.
    """

    proven: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The result of proving a table.

    Attributes:
        spec: The table, restricted to what was proven.
        claims: Name, as in ``CLAIMS``, -> claim.
        stated: Proven unit kind -> reason why no stock config states a model with fewer units; empty if one does.
    """

    spec: ArchSpec
    claims: Mapping[str, Claim]
    stated: Mapping[str, str] = field(default_factory=dict)

    def kinds(self) -> tuple[str, ...]:
        """Returns the unit kinds that can be removed."""
        return tuple(kind for kind, claim in KIND_CLAIMS.items() if self.claims[claim].proven)

    def kind_claims(self) -> dict[str, str]:
        """Returns unit kind -> claim, for the kinds that the class has."""
        return {k: claim for k, claim in KIND_CLAIMS.items() if k != "experts" or self.spec.experts is not None}

    @property
    def usable(self) -> bool:
        """Whether models of the class can be scored and pruned: the output head and one unit kind are proven."""
        return self.claims["head"].proven and self.claims["keep_all"].proven and bool(self.kinds())

    @property
    def verdict(self) -> str:
        """``proven`` if MLP neurons (or experts), heads and layers can be removed, ``in part``, or ``refused``."""
        if not self.usable:
            return "refused"
        inner = {"mlp", "experts"} & set(self.kinds())
        return "proven" if inner and {"heads", "layers"} <= set(self.kinds()) else "in part"

    def reason(self) -> str:
        """Returns why the class is refused; empty if it is usable."""
        if self.usable:
            return ""
        if not self.claims["head"].proven:
            names = ["head"]
        else:
            names = ["keep_all"] if self.kinds() else list(self.kind_claims().values())
        return "; ".join(f"{name.replace('_', ' ')}: {self.claims[name].reason}" for name in names)


def prove(spec: ArchSpec, model: nn.Module) -> Proof:
    """Proves a table on a tiny model.

    Args:
        spec: The table.
        model: A tiny model of the class with random float64 weights, see :func:`hfprune.models.twins.twin`. It is not
            changed.

    Returns:
        The claims, and the table restricted to those that hold.

    Example:
        >>> from hfprune.models.architectures import LLAMA
        >>> from hfprune.models.twins import twin
        >>> from transformers import LlamaConfig
        >>> proof = prove(LLAMA, twin(LlamaConfig()))
        >>> proof.verdict, proof.kinds(), proof.claims["experts"].reason
        ('proven', ('mlp', 'heads', 'layers', 'channels'), 'LlamaForCausalLM has no mixture-of-experts layers')
        >>> wrong = prove(replace(LLAMA, mlp=LLAMA.mlp[1:]), twin(LlamaConfig()))  # without the gate
        >>> wrong.claims["neurons"].proven, wrong.kinds()
        (False, ('heads', 'layers'))
    """
    dense: Any = deepcopy(model)
    pin_spec(dense, spec)
    claims = {"head": _claim(checks.check_logits, dense)}
    for kind, name in KIND_CLAIMS.items():
        claims[name] = _removal(dense, spec, kind)
    kinds = tuple(kind for kind, name in KIND_CLAIMS.items() if claims[name].proven)
    claims["keep_all"] = _claim(checks.check_keep_all, dense, kinds) if kinds else _NOTHING
    stated = {kind: _claim(checks.check_reload, dense, (kind,)).reason for kind in kinds}
    together = tuple(kind for kind in kinds if not stated[kind])
    reload = stated | ({" + ".join(together): _claim(checks.check_reload, dense, together).reason} if together else {})
    wrong = [f"{kind}: {reason}" for kind, reason in reload.items() if reason]
    claims["config_reload"] = Claim(proven=bool(kinds) and not wrong, reason="; ".join(wrong))
    packing, claims["packing"] = _packing(dense, spec)
    padding, claims["padding"] = _padding(dense, spec)
    found = replace(_restricted(spec, claims), packing=packing, padding=padding)
    return Proof(spec=found, claims={name: claims[name] for name in CLAIMS}, stated=stated)


_NOTHING = Claim(proven=False, reason="no unit kind was proven")


def _claim(check: Callable[..., None], *args: Any) -> Claim:
    """Returns the claim that ``check`` does not fail. Foreign forward passes raise anything."""
    try:
        check(*args)
    except Failed as error:
        return Claim(proven=False, reason=str(error))
    except HFPruneError as error:
        return Claim(proven=False, reason=_why(str(error)))
    except Exception as error:  # the class is foreign code
        return Claim(proven=False, reason=f"its forward pass fails: {first_line(error).rstrip('.')}")
    return Claim(proven=True)


def _removal(dense: nn.Module, spec: ArchSpec, kind: str) -> Claim:
    """Returns the claim that removing units of a kind equals masking them."""
    try:
        groups = find_groups(dense, (kind,), spec=spec)
    except HFPruneError as error:
        return Claim(proven=False, reason=_why(str(error)))
    if not groups or all(group.num_units <= group.least for group in groups):
        return Claim(proven=False, reason="each layer has a single unit, or none")
    return _claim(checks.REMOVALS[kind], dense, groups)


def _why(text: str) -> str:
    """Returns the reason within the message of a refused unit kind.

    >>> _why("Heads of MyForCausalLM cannot be removed: its norms run over all heads. Leave 'heads' out of the units.")
    'its norms run over all heads'
    """
    text = text.partition(" cannot be removed: ")[2] or text
    for end in (". Leave '", ": leave '", ". Use the unit"):
        text = text.partition(end)[0]
    return text.rstrip(".")


def _packing(dense: nn.Module, spec: ArchSpec) -> tuple[Any, Claim]:
    """Returns how packed documents are separated, and the claim that they are."""
    first: Claim | None = None
    for packing in dict.fromkeys((spec.packing, "positions", "mask")):
        other = deepcopy(dense)
        pin_spec(other, replace(spec, packing=packing))
        claim = _claim(checks.check_packing, other)
        if claim.proven:
            return packing, claim
        first = first or claim
    assert first is not None
    return "none", first


def _padding(dense: nn.Module, spec: ArchSpec) -> tuple[Any, Claim]:
    """Returns on which side padding is possible, and the claim that it is on both."""
    other = deepcopy(dense)
    pin_spec(other, replace(spec, padding="any"))
    for side, possible in (("right", "none"), ("left", "right")):
        claim = _claim(checks.check_padding, other, side)
        if not claim.proven:
            return possible, claim
    return "any", claim


def _restricted(spec: ArchSpec, claims: Mapping[str, Claim]) -> ArchSpec:
    """Returns ``spec`` with the reasons of what was not proven."""

    def reason(name: str) -> str:
        return claims[name].reason

    changes: dict[str, Any] = {}
    if spec.mlp:
        changes["no_mlp"] = reason("neurons")
    if spec.attention is not None:
        changes["no_heads"] = reason("heads")
    if spec.experts is not None:
        changes["no_experts"] = reason("experts")
    if spec.stream is not None and not claims["channels"].proven:
        changes |= {"stream": None, "no_stream": reason("channels")}
    return replace(spec, no_layers=reason("layers"), **changes)
