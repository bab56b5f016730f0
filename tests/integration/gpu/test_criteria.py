"""What is computed on CUDA is what the CPU computes: scores, fits, curves, figures; and memory.

In float64. OPT and GPT-2 stay in it and agree to 1e-9; the RMS norms, routers and rotary angles of the other classes
round to float32 whatever the dtype, and so does what follows from them.
"""

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hfprune import criteria as found_criteria
from hfprune.allocation import uniform_keep
from hfprune.compensation import LeastSquares, MeanCompensation, OutputRegression
from hfprune.criteria import (
    ActivationNorm,
    ActivationTaylor,
    CalibratedCriterion,
    Reconstruction,
    SlimLLMHeads,
    WeightCriterion,
    WeightTaylor,
    resolve_objective,
)
from hfprune.criteria.activation_norm import squares
from hfprune.criteria.base import BatchInfo
from hfprune.evaluation import DenseReference, fidelity, perplexity
from hfprune.models import find_groups
from hfprune.models.forward import final_hidden
from hfprune.objectives import OBJECTIVES, OutputHead
from hfprune.objectives.sampled import draw
from hfprune.pruning.accumulator import ImportanceAccumulator, check_criterion, weight_scores
from hfprune.pruning.layer_scores import layer_cosines, layer_perplexities
from hfprune.pruning.layerwise import LayerwisePass
from hfprune.pruning.sensitivity_curves import kl_curves
from hfprune.utils.errors import ConfigError
from tests.helpers.models import mixtures, tiny, token_ids
from tests.helpers.toys import calibrate

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
    pytest.mark.filterwarnings("default"),  # what CUDA warns of is shown, and fails nothing
]

WIDE = ("opt", "gpt2")  # float64 throughout
NAMES = ("llama", "qwen2", "mixtral", *WIDE)
BATCHES = [{"input_ids": token_ids(2, 12, seed=seed)} for seed in range(4)]


def tolerance(name):
    return 1e-9 if name in WIDE else 2e-5


def moved(batches=BATCHES, device=DEVICE):
    return [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]


def both(name, seed=0):
    """The same model on the CPU and on CUDA."""
    model = tiny(name, seed=seed)
    return model, copy.deepcopy(model).to(DEVICE)


def check(found, expected, rtol):
    """Relative to the largest entry: scores near zero are differences of larger ones."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = float(value.detach().abs().max())
        torch.testing.assert_close(
            found[key].cpu(), value, rtol=rtol, atol=rtol * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


def concrete(base):
    classes = (getattr(found_criteria, name) for name in found_criteria.__all__)
    return [c for c in classes if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)]


VARIANTS = [
    ActivationTaylor(reduction="signed"),
    WeightTaylor(gradient="dataset", salience="param_mix"),
    WeightTaylor(salience="param_second", weighting="token"),
    SlimLLMHeads(dropped=0.5),
]
CRITERIA = [c() for c in (*concrete(CalibratedCriterion), *concrete(WeightCriterion))] + VARIANTS


def scores(model, criterion, groups, device):
    if isinstance(criterion, WeightCriterion):
        return weight_scores(model, groups, criterion)
    objective = resolve_objective(criterion, None) or "entropy" if hasattr(criterion, "objectives") else None
    return calibrate(model, criterion, objective, groups=groups, batches=moved(device=device))


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: "-".join(c.describe().values()))
def test_every_criterion_scores_as_on_the_cpu(criterion):
    compared = 0
    for name in NAMES:
        for unit in ("mlp", "heads", "experts"):
            if (unit == "experts") != (name in mixtures()) and unit != "heads":
                continue
            here, there = both(name)
            groups = find_groups(here, (unit,))
            try:
                check_criterion(here, groups, criterion)
            except ConfigError:  # it does not score these units
                continue
            expected, found = scores(here, criterion, groups, "cpu"), scores(there, criterion, groups, DEVICE)
            check(found, expected, tolerance(name))
            widths = [group.num_units // 2 for group in groups]
            assert uniform_keep(found, groups, widths) == uniform_keep(expected, groups, widths)
            compared += 1
    assert compared


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("criterion", [ActivationTaylor(), ActivationNorm()], ids=["gradients", "activations"])
def test_padding_and_batches_of_many(name, criterion):
    ids = token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, :4] = 0, 0
    found = []
    for model, device in zip(both(name), ("cpu", DEVICE), strict=True):
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        accumulator = ImportanceAccumulator(model, find_groups(model), criterion)
        found.append(_accumulated(accumulator, model, batch, criterion))
    check(found[1], found[0], tolerance(name))


def _accumulated(accumulator, model, batch, criterion):
    from hfprune.models.forward import objective_sum, run_backbone, token_counts
    from hfprune.pruning.accumulator import ObjectiveSum

    def objective():
        total, valid = objective_sum(model, OBJECTIVES.get("entropy"), batch)
        return ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=batch["attention_mask"] == 0)

    with accumulator.recording():
        if isinstance(criterion, ActivationNorm):
            accumulator.observe(lambda: run_backbone(model, batch), *token_counts(batch))
        else:
            accumulator.step(objective)
    return accumulator.scores()


@pytest.mark.parametrize("name", NAMES)
def test_sampled_labels_are_the_same(name):
    drawn = []
    for model, device in zip(both(name), ("cpu", DEVICE), strict=True):
        with torch.no_grad():
            for batch in moved(device=device):
                hidden, mask = final_hidden(model, batch)
                numbers, _ = OBJECTIVES.get("sampled").targets(batch["input_ids"], mask, None)
                p = OutputHead.of(model.get_output_embeddings()).logits(hidden.flatten(0, 1)).softmax(-1)
                drawn.append(draw(p, numbers.flatten()).cpu())
    here, there = torch.cat(drawn[: len(BATCHES)]), torch.cat(drawn[len(BATCHES) :])
    assert torch.equal(here, there)
    assert here.unique().numel() > 5


# ---- closed form ------------------------------------------------------------------------------------------------------

FITS = {
    "least squares": LeastSquares(),
    "least squares, dense": LeastSquares(target="dense", tokens="equal"),
    "least squares, not in turn": LeastSquares(sequential=False),
    "regression": OutputRegression(),
    "regression, dense": OutputRegression(target="dense"),
    "mean": MeanCompensation(),
    "none": None,
}


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", ["llama", *WIDE])
def test_fits_are_those_of_the_cpu(name, fit, place):
    if name == "llama" and fit == "mean":
        pytest.skip("its projections have no bias")
    results, models = [], both(name)
    for model, where in zip(models, ("cpu", place), strict=True):
        groups = find_groups(model, ("mlp", "heads"))
        widths = {group.name: group.num_units // 2 for group in groups}
        keep = {group.name: tuple(range(0, group.num_units, 2)) for group in groups}
        criterion = Reconstruction() if fit == "none" else None
        work = LayerwisePass(model, groups, compensation=FITS[fit])
        with torch.no_grad():
            results.append(
                work.run(moved(device=where), widths, keep=None if fit == "none" else keep, criterion=criterion)
            )
    here, there = results
    assert there.keep == here.keep
    check(there.scores, here.scores, tolerance(name))
    assert there.errors == pytest.approx(here.errors, rel=1e-7 if name in WIDE else 1e-3, abs=1e-9)
    expected, found = (dict(model.named_parameters()) for model in models)
    check(found, expected, tolerance(name))
    assert all(parameter.device.type == DEVICE for parameter in found.values())


# ---- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_curves_layer_scores_and_evaluation(name):
    found = []
    windows = torch.cat([batch["input_ids"] for batch in BATCHES])
    for model, other, device in zip(both(name), both(name, seed=1), ("cpu", DEVICE), strict=True):
        batches, groups = (
            moved(device=device),
            find_groups(model, ("heads",) if name in mixtures() else ("mlp", "heads")),
        )
        order = {group.name: torch.arange(group.num_units, dtype=torch.float64) for group in groups}
        curves = kl_curves(model, groups, order, batches, (0.75, 0.5))
        near = fidelity(DenseReference.collect(model, windows), other)
        found.append(
            {
                "curves": torch.tensor([kl for curve in curves.values() for kl in curve.values()], dtype=torch.float64),
                "cosines": layer_cosines(model, batches),
                "perplexities": layer_perplexities(model, batches),
                "perplexity": torch.tensor(perplexity(model, windows).nll, dtype=torch.float64),
                "kl": torch.tensor([near.kl, near.reverse_kl, near.js_distance, *near.kl_by_position]),
                "same": torch.tensor([near.top1_agreement, near.jaccard_5, near.jaccard_15]),
            }
        )
    check(found[1], found[0], 10 * tolerance(name))


# ---- memory -----------------------------------------------------------------------------------------------------------


def peak(run):
    """Bytes that ``run`` takes at once beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.skipif(DEVICE != "cuda", reason="counts CUDA memory")
def test_scoring_takes_less_than_the_logits_through_autograd():
    vocab, rows, length = 32_000, 4, 1024
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=length, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    ids = token_ids(rows, length, vocab=vocab).to(DEVICE)

    def score(ids=ids):
        calibrate(model, ActivationTaylor(), "entropy", groups=find_groups(model), batches=[{"input_ids": ids}])

    def whole():
        log_p = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        (-(log_p.exp() * log_p).sum()).backward()

    score(ids[:1, :16])  # libraries take their workspaces
    logits = rows * length * vocab * 4
    ours, theirs = peak(score), peak(whole)
    assert theirs > 2 * logits
    assert ours < logits / 2, f"{ours / 2**20:.0f} MiB; the logits take {logits / 2**20:.0f} MiB"


def test_norms_of_bfloat16_activations_are_summed_in_float32():
    signal = torch.randn(2, 900, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    padding = torch.zeros(2, 900, dtype=torch.bool)
    padding[1, :300] = True
    info = BatchInfo(num_sequences=2, num_tokens=torch.tensor([900, 600]), padding=padding)
    expected = signal.double().masked_fill(padding[..., None], 0.0).square().sum(1)
    on_device = BatchInfo(num_sequences=2, num_tokens=info.num_tokens.to(DEVICE), padding=padding.to(DEVICE))
    assert torch.allclose(squares(signal.to(DEVICE), on_device).cpu(), expected, rtol=1e-6)
