"""Mixtures of experts by the long way: token by token, expert by expert, in float64."""

import torch

RENORMALISED = ("mixtral",)
"""Model types whose routers always let the chosen weights add up to one."""


def mixture(layer, x, *, kind, chosen_count, removed=(), factors=None, norms=None):
    """Output [N, H] of a layer's mixture for x [N, H]; ``removed`` experts have a router logit of minus infinity.

    ``factors`` [N, E] multiplies what each expert contributes to each token. ``norms``: a list that receives a
    dictionary for each token: expert -> length of what it adds.
    """
    router, experts = layer.gate, layer.experts
    rows = []
    for n, token in enumerate(x):
        logits = [float("-inf") if e in removed else row @ token
                  for e, row in enumerate(router.weight)]  # fmt: skip
        powers = [torch.exp(value) if e not in removed else torch.zeros(()).double() for e, value in enumerate(logits)]
        probabilities = [power / sum(powers) for power in powers]
        best = sorted(range(len(powers)), key=lambda e, p=probabilities: -float(p[e].detach()))[:chosen_count]
        weights = {e: probabilities[e] for e in best}
        if kind in RENORMALISED or getattr(router, "norm_topk_prob", False):
            total = sum(weights.values())
            weights = {e: w / total for e, w in weights.items()}
        out, lengths = torch.zeros_like(token), {}
        for e, weight in weights.items():
            both = experts.gate_up_proj[e] @ token
            half = len(both) // 2
            inner = both[:half] * torch.sigmoid(both[:half]) * both[half:]
            factor = 1.0 if factors is None else factors[n, e]
            added = weight * (experts.down_proj[e] @ inner)
            out = out + factor * added
            lengths[e] = sum(value * value for value in added.tolist()) ** 0.5
        if hasattr(layer, "shared_expert"):
            out = out + torch.sigmoid(layer.shared_expert_gate(token)) * layer.shared_expert(token)
        rows.append(out)
        if norms is not None:
            norms.append(lengths)
    return torch.stack(rows)


def by_hand(model, *, removed=None, factors=None, norms=None):
    """Makes ``model``, in place, compute its mixtures by the long way.

    ``removed``: layer -> experts that no router may choose. ``factors``: a list that receives one leaf [N, E] for
    each layer and forward pass, in order. ``norms``: layer -> a list, see ``mixture``.
    """
    kind, count = model.config.model_type, model.config.num_experts_per_tok

    def forward_of(index, layer):
        def forward(hidden):
            flat = hidden.reshape(-1, hidden.shape[-1])
            leaf = None
            if factors is not None:
                leaf = torch.ones(len(flat), len(layer.gate.weight), dtype=flat.dtype, requires_grad=True)
                factors.append(leaf)
            gone = () if removed is None else removed[index]
            found = None if norms is None else norms[index]
            out = mixture(layer, flat, kind=kind, chosen_count=count, removed=gone, factors=leaf, norms=found)
            return out.reshape_as(hidden)

        return forward

    for index, layer in enumerate(model.model.layers):
        layer.mlp.forward = forward_of(index, layer.mlp)
    return model


def contributions(model, sequences, loss):
    """For each sequence and layer: d loss / d factor of every token and expert, [T, E]: what its contribution is worth."""
    factors = []
    by_hand(model, factors=factors)
    found = []
    for ids in sequences:
        factors.clear()
        total, _ = loss(model, ids)
        total.backward()
        found.append([leaf.grad.clone() for leaf in factors])
    return found
