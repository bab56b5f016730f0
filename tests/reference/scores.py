"""Scores of MLP neurons by the long way: all weights trainable, whole logits, autograd, one sequence at a time, loops."""

import torch


def sequence_objective(logits, ids, objective):
    """Summed objective of one unpadded sequence: logits [T, V], ids [T]."""
    log_p = torch.log_softmax(logits, dim=-1)
    if objective == "entropy":
        return -(log_p.exp() * log_p).sum(), len(ids)
    return -log_p[:-1].gather(1, ids[1:, None]).sum(), len(ids) - 1


def run(model, sequences, objective, consumers):
    """For every sequence: [(a, g)] per consumer projection and the weight gradients of the sum.

    consumers: names of the projections that consume the neurons (down_proj). Yields (tokens, {name: (a, g)}, {name: dW}).
    """
    model.eval()
    for p in model.parameters():
        p.requires_grad_(True)
    modules = dict(model.named_modules())
    for ids in sequences:
        model.zero_grad()
        seen = {}

        def keep(name, seen=seen):
            def hook(module, args):
                args[0].retain_grad()
                seen[name] = args[0]

            return hook

        handles = [modules[name].register_forward_pre_hook(keep(name)) for name in consumers]
        logits = model(input_ids=ids[None]).logits[0]
        total, tokens = sequence_objective(logits, ids, objective)
        total.backward()
        for h in handles:
            h.remove()
        pairs = {n: (x.detach().reshape(len(ids), -1), x.grad.reshape(len(ids), -1)) for n, x in seen.items()}
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        yield tokens, pairs, grads


def activation_score(model, sequences, objective, consumers, reduction, weighting):
    """{consumer: score [units]} by loops over sequences, tokens and neurons."""
    sums, tokens_seen, count = {}, 0, 0
    for tokens, pairs, _ in run(model, sequences, objective, consumers):
        weight = 1.0 if weighting == "token" else 1.0 / tokens
        tokens_seen, count = tokens_seen + tokens, count + 1
        for name, (a, g) in pairs.items():
            out = sums.setdefault(name, [0.0] * a.shape[1])
            for j in range(a.shape[1]):
                terms = [float(a[t, j]) * float(g[t, j]) for t in range(a.shape[0])]
                if reduction == "per_token":
                    out[j] += weight * sum(abs(v) for v in terms)
                elif reduction == "per_sequence":
                    out[j] += weight * abs(sum(terms))
                else:
                    out[j] += weight * sum(terms)
    divisor = tokens_seen if weighting == "token" else count
    return {n: torch.tensor([abs(v) / divisor for v in s], dtype=torch.float64) for n, s in sums.items()}


def weight_score(model, sequences, objective, rows, columns, consumers, weighting):
    """{consumer: sum of |w dw|} over each neuron's rows of ``rows`` weights and columns of ``columns`` weights.

    rows / columns: consumer -> list of (parameter name, first channel); weights are [out, in].
    """
    sums, tokens_seen, count = {}, 0, 0
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    for tokens, pairs, grads in run(model, sequences, objective, consumers):
        weight = 1.0 if weighting == "token" else 1.0 / tokens
        tokens_seen, count = tokens_seen + tokens, count + 1
        for name in consumers:
            width = pairs[name][0].shape[1]
            out = sums.setdefault(name, [0.0] * width)
            for j in range(width):
                for parameter, first in rows[name]:
                    out[j] += weight * float(
                        (parameters[parameter][first + j] * grads[parameter][first + j]).abs().sum()
                    )
                for parameter, first in columns[name]:
                    product = parameters[parameter][:, first + j] * grads[parameter][:, first + j]
                    out[j] += weight * float(product.abs().sum())
    divisor = tokens_seen if weighting == "token" else count
    return {n: torch.tensor([v / divisor for v in s], dtype=torch.float64) for n, s in sums.items()}
