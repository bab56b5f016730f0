"""Objectives, one token and one vocabulary entry at a time, in Python floats (float64)."""

import math


def softmax(z):
    top = max(z)
    e = [math.exp(v - top) if v != -math.inf else 0.0 for v in z]
    total = sum(e)
    return [v / total for v in e]


def entropy(z):
    """-sum p log p with 0 log 0 = 0."""
    return -sum(p * math.log(p) for p in softmax(z) if p > 0)


def entropy_grad(z):
    """The gradient of the entropy with respect to the logits: -p (log p + Ent)."""
    p, ent = softmax(z), entropy(z)
    return [-q * (math.log(q) + ent) if q > 0 else 0.0 for q in p]


def cross_entropy(z, y):
    return -math.log(softmax(z)[y])


def cross_entropy_grad(z, y):
    return [p - (1.0 if v == y else 0.0) for v, p in enumerate(softmax(z))]


def finite_difference(f, z, step=1e-6):
    """Central differences of a scalar function of a list."""
    grad = []
    for i in range(len(z)):
        up, down = list(z), list(z)
        up[i] += step
        down[i] -= step
        grad.append((f(up) - f(down)) / (2 * step))
    return grad


def kl(z_teacher, z, temperature=1.0):
    """KL(softmax(z_teacher / temperature) || softmax(z)) with 0 log 0 = 0."""
    q, p = softmax([v / temperature for v in z_teacher]), softmax(z)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True) if a > 0)


def kl_grad(z_teacher, z, temperature=1.0):
    q, p = softmax([v / temperature for v in z_teacher]), softmax(z)
    return [b - a for a, b in zip(q, p, strict=True)]


def teacher_distillation(z, teacher, y, alpha, t):
    """(1 - alpha) CE + alpha t^2 KL(q || p), both tempered."""
    q, p = softmax([v / t for v in teacher]), softmax([v / t for v in z])
    kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)
    return (1 - alpha) * cross_entropy(z, y) + alpha * t * t * kl


def top_distillation(z, teacher, label, alpha, temperature, k):
    """As ``teacher_distillation``, with all but the teacher's ``k`` most likely tokens taken as one."""
    p, q = softmax([t / temperature for t in teacher]), softmax([v / temperature for v in z])
    known = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    kl = sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in known)
    rest_p, rest_q = (sum(x[i] for i in range(len(x)) if i not in known) for x in (p, q))
    if rest_p > 0:
        kl += rest_p * (math.log(rest_p) - math.log(rest_q))
    return (1 - alpha) * cross_entropy(z, label) + alpha * temperature**2 * kl
