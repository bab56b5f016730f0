"""Divergences of two distributions over tokens, one entry at a time, in float64."""

import math


def log_softmax(logits):
    top = max(logits)
    lse = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - lse for z in logits]


def kl(log_p, log_q):
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if a > -math.inf)


def js_distance(log_p, log_q):
    log_m = [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in zip(log_p, log_q, strict=True)]
    return math.sqrt((kl(log_p, log_m) + kl(log_q, log_m)) / 2)


def top(values, k):
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def jaccard(log_p, log_q, k):
    a, b = top(log_p, k), top(log_q, k)
    return len(a & b) / len(a | b)


def token(dense, other):
    """Every quantity of one token, by name."""
    p, q = log_softmax(dense), log_softmax(other)
    return {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "js_distance": js_distance(p, q),
        "top1_agreement": float(top(p, 1) == top(q, 1)),
        "jaccard_5": jaccard(p, q, 5),
        "jaccard_15": jaccard(p, q, 15),
    }
