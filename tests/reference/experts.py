"""Mixtures of experts by the long way: token by token, expert by expert, in float64."""

import functools

import torch

RENORMALISED = ("mixtral", "gpt_oss", "granitemoe")
"""Model types whose routers always let the chosen weights add up to one."""
PLACES = {"granitemoe": "block_sparse_moe", "llama4_text": "feed_forward"}
"""Name of the mixture in a layer, where it is not ``mlp``."""


def block_of(model, layer):
    """Returns the mixture, or the dense MLP, of a layer."""
    return getattr(layer, PLACES.get(model.config.model_type, "mlp"))


def router_of(block):
    """Returns the router of a mixture."""
    return block.gate if hasattr(block, "gate") else block.router


def mixed_layers(model):
    """Returns the indices of the layers with a mixture."""
    return [i for i, layer in enumerate(model.model.layers) if hasattr(block_of(model, layer), "experts")]


def route(router, token, *, config, removed=()):
    """Returns expert -> router weight for one token; ``removed`` experts have a router logit of minus infinity."""
    kind, count = config.model_type, config.num_experts_per_tok
    logits = {}
    for e, row in enumerate(router.weight):
        if e not in removed:
            logits[e] = row @ token + (router.bias[e] if kind == "gpt_oss" else 0.0)
    if kind in ("deepseek_v3", "glm4_moe"):
        weights = {e: 1 / (1 + torch.exp(-value)) for e, value in logits.items()}
        rank = {e: float(value.detach() + router.e_score_correction_bias[e]) for e, value in weights.items()}
    elif kind == "llama4_text":
        weights = {e: 1 / (1 + torch.exp(-value)) for e, value in logits.items()}
        rank = {e: float(value.detach()) for e, value in weights.items()}
    else:
        powers = {e: torch.exp(value) for e, value in logits.items()}
        weights = {e: power / sum(powers.values()) for e, power in powers.items()}
        rank = {e: float(value.detach()) for e, value in weights.items()}
    best = sorted(in_best_groups(router, rank, config), key=lambda e: -rank[e])[:count]
    weights = {e: weights[e] for e in best}
    if kind in RENORMALISED or (kind != "deepseek_v2" and getattr(router, "norm_topk_prob", False)):
        total = sum(weights.values())
        weights = {e: w / total for e, w in weights.items()}
    factor = config.routed_scaling_factor if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe") else 1.0
    return {e: factor * w for e, w in weights.items()}


def in_best_groups(router, rank, config):
    """Returns the experts among which a router chooses: all, or those of the best groups of consecutive experts."""
    kind, groups = config.model_type, getattr(config, "n_group", None) or 1
    if groups == 1 or getattr(config, "topk_method", None) == "greedy":
        return list(rank)
    size = len(router.weight) // groups
    members = [[e for e in rank if e // size == g] for g in range(groups)]
    best = 1 if kind == "deepseek_v2" else 2
    worth = [sum(sorted((rank[e] for e in part), reverse=True)[:best]) for part in members]
    chosen = sorted(range(groups), key=lambda g: -worth[g])[: config.topk_group]
    return [e for g in chosen for e in members[g]]


def expert_inner(experts, e, token, *, kind):
    """Returns the activations of the neurons of one expert for one token."""
    if kind == "gpt_oss":
        both = token @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[0::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    both = token @ experts.gate_up_proj[e] if kind == "llama4_text" else experts.gate_up_proj[e] @ token
    half = len(both) // 2
    return both[:half] * torch.sigmoid(both[:half]) * both[half:]


def expert_output(experts, e, inner, *, kind):
    """Returns the output of one expert for the activations of its neurons."""
    if kind == "gpt_oss":
        return inner @ experts.down_proj[e] + experts.down_proj_bias[e]
    return inner @ experts.down_proj[e] if kind == "llama4_text" else experts.down_proj[e] @ inner


def mixture(block, x, *, config, removed=(), factors=None, norms=None, neurons=None):
    """Output [N, H] of a mixture for x [N, H]; ``removed`` experts have a router logit of minus infinity.

    ``factors`` [N, E] multiplies what each expert contributes to each token. ``norms``: a list that receives a
    dictionary for each token: expert -> length of what it adds. ``neurons``: ``inner`` of ``by_hand`` for this layer.
    """
    kind, experts = config.model_type, block.experts
    rows = []
    for n, token in enumerate(x):
        out, lengths = torch.zeros_like(token), {}
        for e, weight in route(router_of(block), token, config=config, removed=removed).items():
            scaled = kind == "llama4_text"  # the weight multiplies the input
            inner = expert_inner(experts, e, weight * token if scaled else token, kind=kind)
            inner = inner if neurons is None else neurons(n, e, inner, 1.0 if scaled else weight)
            added = expert_output(experts, e, inner, kind=kind) * (1.0 if scaled else weight)
            out = out + (1.0 if factors is None else factors[n, e]) * added
            lengths[e] = sum(value * value for value in added.tolist()) ** 0.5
        out = out + shared(block, token)
        rows.append(out)
        if norms is not None:
            norms.append(lengths)
    return torch.stack(rows)


def shared(block, token):
    """Returns what the shared expert adds to every token, 0 without one."""
    if hasattr(block, "shared_experts"):
        return block.shared_experts(token)
    if not hasattr(block, "shared_expert"):
        return 0.0
    gate = torch.sigmoid(block.shared_expert_gate(token)) if hasattr(block, "shared_expert_gate") else 1.0
    return gate * block.shared_expert(token)


def by_hand(model, *, removed=None, factors=None, norms=None, inner=None):
    """Makes ``model``, in place, compute its mixtures by the long way.

    ``removed``: layer -> experts that no router may choose. ``factors``: a list that receives one leaf [N, E] for
    each mixture and forward pass, in order. ``norms``: layer -> a list, see ``mixture``. ``inner``: a function of
    layer, token, expert, the outputs of its neurons and its router weight, which returns the outputs that count.
    """
    paired = model.config.model_type in ("gpt_oss", "llama4_text")  # their mixtures return router scores, too

    def forward_of(index, block):
        def forward(hidden):
            flat = hidden.reshape(-1, hidden.shape[-1])
            leaf = None
            if factors is not None:
                leaf = torch.ones(len(flat), len(router_of(block).weight), dtype=flat.dtype, requires_grad=True)
                factors.append(leaf)
            gone = () if removed is None else removed[index]
            found = None if norms is None else norms[index]
            own = None if inner is None else functools.partial(inner, index)
            out = mixture(block, flat, config=model.config, removed=gone, factors=leaf, norms=found, neurons=own)
            return (out.reshape_as(hidden), None) if paired else out.reshape_as(hidden)

        return forward

    for index in mixed_layers(model):
        block = block_of(model, model.model.layers[index])
        block.forward = forward_of(index, block)
    return model


def contributions(model, sequences, loss):
    """For each sequence: layer -> d loss / d factor of every token and expert, [T, E]: what its contribution is worth."""
    factors = []
    layers = mixed_layers(model)
    by_hand(model, factors=factors)
    found = []
    for ids in sequences:
        factors.clear()
        total, _ = loss(model, ids)
        total.backward()
        found.append({layer: leaf.grad.clone() for layer, leaf in zip(layers, factors, strict=True)})
    return found


def without_neurons(model, kept):
    """Makes ``model`` drop the outputs of neurons: ``kept`` is layer -> expert -> the neurons that count."""

    def inner(layer, token, e, values, weight):
        return torch.stack([v if j in kept[layer][e] else v * 0 for j, v in enumerate(values)])

    return by_hand(model, inner=inner)


def neuron_worth(model, sequences, loss):
    """For each sequence: (layer, expert) -> rows [n, I] of weighted outputs and of d loss / d weighted outputs."""
    seen = {}

    def inner(layer, token, e, values, weight):
        leaf = (values * weight).detach().requires_grad_(True)
        seen.setdefault((layer, e), []).append(leaf)
        return values + (leaf - leaf.detach()) / (weight.detach() if torch.is_tensor(weight) else weight)

    by_hand(model, inner=inner)
    found = []
    for ids in sequences:
        seen.clear()
        total, _ = loss(model, ids)
        total.backward()
        found.append({k: (torch.stack(v).detach(), torch.stack([x.grad for x in v])) for k, v in seen.items()})
    return found


def mean_over_routed(norms, experts):
    """REAP from ``norms``, one dictionary for each token: mean length over the tokens routed to an expert, else 0."""
    found = []
    for e in range(experts):
        own = [token[e] for token in norms if e in token]
        found.append(sum(own) / len(own) if own else 0.0)
    return found
