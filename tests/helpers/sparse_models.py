"""Sparse models, and what they are written with."""

import torch

from hfprune.io.save import export_model
from hfprune.plan import PruningPlan
from tests.helpers.models import token_ids


def logits(model):
    """Returns the logits [2, 12, V] of the random ids."""
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def sparse(model, share=0.5):
    """Zeroes a share of every weight of the layers' projections."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and name.endswith("weight"):
                parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return model


def written(model, folder, **kwargs):
    """Exports a model without its zeros; returns what ``export_model`` does."""
    plan = PruningPlan(model_class=type(model).__name__, groups=(), keep={}, config={})
    return export_model(model, None, plan, folder, layout="bitmask", **kwargs)
