"""Every criterion against loops over sequences, tokens and neurons in float64 (acceptance tests 2 to 5)."""

from contextlib import ExitStack

import pytest
import torch

from hfprune.criteria import ActivationTaylor, BatchInfo, Signal, Sums, Totals, WeightTaylor
from hfprune.models import backbone, find_groups, output_head
from hfprune.models.forward import objective_sums
from hfprune.objectives import OBJECTIVES, chunked_objective
from hfprune.plan import Group, Slice
from hfprune.pruning.accumulator import ImportanceAccumulator, ObjectiveSum, backward
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.models import NAMES, tiny, token_ids
from tests.reference import scores as slow


def objective_sum(model, objective, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    targets, valid = OBJECTIVES.get(objective).targets(ids, mask, None)
    hidden = backbone(model)(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
    ).last_hidden_state
    total = chunked_objective(
        OBJECTIVES.get(objective), hidden[valid], output_head(model), None if targets is None else targets[valid]
    )
    padding = None if mask.all() else mask == 0
    return ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=padding)


def calibrate(model, batches, criterion, objective="entropy"):
    """Batches: list of ids [B, T] or (ids, mask)."""
    accumulator = ImportanceAccumulator(model, find_groups(model), criterion)
    with accumulator.recording():
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            accumulator.step(lambda ids=ids, mask=mask: objective_sum(model, objective, ids, mask))
    return accumulator


def consumers(model):
    return [g.inputs()[0].module for g in find_groups(model)]


def padded(sequences, side):
    """Sequences of different lengths as one batch; padding holds a real token id, so that only the mask can tell."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), 7)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(sequences):
        where = slice(0, len(s)) if side == "right" else slice(longest - len(s), longest)
        ids[row, where], mask[row, where] = s, 1
    return ids, mask


@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["per_token", "per_sequence", "signed"])
@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize("name", ["llama", "llama_mha_relu", "gemma2", "opt", "gpt2"])
def test_activation_taylor_equals_loops(name, objective, reduction, weighting):
    sequences = [token_ids(1, n, seed=n)[0] for n in (5, 9)]
    criterion = ActivationTaylor(reduction=reduction, weighting=weighting)
    found = calibrate(tiny(name), [s[None] for s in sequences], criterion, objective).scores()
    model = tiny(name)
    expected = slow.activation_score(model, sequences, objective, consumers(model), reduction, weighting)
    for group in find_groups(model):
        torch.testing.assert_close(found[group.name], expected[group.inputs()[0].module], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_weight_taylor_equals_loops(objective, weighting):
    sequences = [token_ids(1, n, seed=n)[0] for n in (5, 9)]
    found = calibrate(
        tiny("llama"), [padded(sequences, "right")], WeightTaylor(weighting=weighting), objective
    ).scores()
    model = tiny("llama")
    mlps = [n.removesuffix(".down_proj") for n in consumers(model)]
    rows = {f"{m}.down_proj": [(f"{m}.gate_proj.weight", 0), (f"{m}.up_proj.weight", 0)] for m in mlps}
    columns = {f"{m}.down_proj": [(f"{m}.down_proj.weight", 0)] for m in mlps}
    expected = slow.weight_score(model, sequences, objective, rows, columns, list(rows), weighting)
    for group in find_groups(model):
        torch.testing.assert_close(found[group.name], expected[group.inputs()[0].module], atol=1e-12, rtol=1e-9)


def test_weight_taylor_reads_both_blocks_of_a_fused_projection():
    sequences = [token_ids(1, 6, seed=1)[0]]
    found = calibrate(tiny("phi3"), [sequences[0][None]], WeightTaylor(), "entropy").scores()
    model = tiny("phi3")
    mlps = [n.removesuffix(".down_proj") for n in consumers(model)]
    rows = {f"{m}.down_proj": [(f"{m}.gate_up_proj.weight", 0), (f"{m}.gate_up_proj.weight", 24)] for m in mlps}
    columns = {f"{m}.down_proj": [(f"{m}.down_proj.weight", 0)] for m in mlps}
    expected = slow.weight_score(model, sequences, "entropy", rows, columns, list(rows), "sequence")
    for group in find_groups(model):
        torch.testing.assert_close(found[group.name], expected[group.inputs()[0].module], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["llama", "llama_untied_bias", "llama_mha_relu", "gemma2", "opt", "gpt2", "phi3"])
def test_identity_of_signed_scores(name):
    """sum_t a g == sum_i D dD; without a nonlinearity after the neuron also == sum_k U dU + c dc."""
    ids = token_ids(1, 8)[0]
    model = tiny(name)
    signed = calibrate(tiny(name), [ids[None]], ActivationTaylor(reduction="signed")).scores()
    ((_, _, grads),) = slow.run(model, [ids], "entropy", consumers(model))
    weights = dict(model.named_parameters())
    for group in find_groups(model):
        down = group.inputs()[0].module + ".weight"
        product = weights[down] * grads[down]
        by_unit = product.sum(1 if name == "gpt2" else 0)
        torch.testing.assert_close(signed[group.name] * 8, by_unit.abs(), atol=1e-12, rtol=1e-9)
        mlp = group.name
        if f"{mlp}.up_proj.weight" in weights:  # up is linear in the activation; gate is not (SiLU, GELU)
            up = (weights[f"{mlp}.up_proj.weight"] * grads[f"{mlp}.up_proj.weight"]).sum(1)
            gate = (weights[f"{mlp}.gate_proj.weight"] * grads[f"{mlp}.gate_proj.weight"]).sum(1)
            if f"{mlp}.up_proj.bias" in weights:
                assert (up.abs() - by_unit.abs()).abs().max() > 1e-6  # dropping the bias term is visible
                up = up + weights[f"{mlp}.up_proj.bias"] * grads[f"{mlp}.up_proj.bias"]
                gate = gate + weights[f"{mlp}.gate_proj.bias"] * grads[f"{mlp}.gate_proj.bias"]
            torch.testing.assert_close(up, by_unit, atol=1e-12, rtol=1e-9)
            if name == "llama_mha_relu":
                torch.testing.assert_close(gate, by_unit, atol=1e-12, rtol=1e-9)
            else:
                assert (gate - by_unit).abs().max() > 1e-6


def test_chain_of_inequalities():
    batches = [token_ids(2, 8, seed=s) for s in range(3)]
    s = {r: calibrate(tiny(), batches, ActivationTaylor(reduction=r)).scores() for r in
         ("signed", "per_sequence", "per_token")}  # fmt: skip
    for name in s["signed"]:
        assert (s["signed"][name] <= s["per_sequence"][name] + 1e-15).all()
        assert (s["per_sequence"][name] <= s["per_token"][name] + 1e-15).all()
        assert (s["signed"][name] < 0.99 * s["per_token"][name]).any()


@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
@pytest.mark.parametrize(
    "criterion",
    [
        ActivationTaylor(),
        ActivationTaylor(weighting="sequence"),
        ActivationTaylor(reduction="per_sequence"),
        ActivationTaylor(reduction="signed"),
        WeightTaylor(),
        WeightTaylor(weighting="token"),
    ],
    ids=lambda c: "-".join(c.describe().values()),
)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox"])
def test_scores_do_not_depend_on_batching_or_padding(name, criterion, objective):
    """Scores are equal for batches of 1 to 5 sequences of different lengths, with left and right padding."""
    sequences = [token_ids(1, n, seed=n)[0] for n in (4, 9, 6, 7, 3)]
    expected = calibrate(tiny(name), [s[None] for s in sequences], criterion, objective).scores()
    for sizes in ((5,), (4, 1), (2, 3)):
        for side in ("left", "right"):
            batches, start = [], 0
            for size in sizes:
                batches.append(padded(sequences[start : start + size], side))
                start += size
            found = calibrate(tiny(name), batches, criterion, objective).scores()
            for group, score in expected.items():
                torch.testing.assert_close(found[group], score, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_give_the_same_score_and_no_weight_gradient(name):
    """Calibration leaves weights and ``requires_grad`` as they were and makes no weight gradient."""
    ids = token_ids(2, 8)
    model = tiny(name)
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    accumulator = calibrate(model, [ids], ActivationTaylor())
    assert all(p.grad is None for p in model.parameters())
    for p, (flag, value) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == flag
        assert torch.equal(p, value)
    other = tiny(name)
    expected = slow.activation_score(other, list(ids), "entropy", consumers(other), "per_token", "token")
    for group in find_groups(model):
        torch.testing.assert_close(
            accumulator.scores()[group.name], expected[group.inputs()[0].module], atol=1e-12, rtol=1e-9
        )


def test_nothing_stays_hooked_and_training_mode_returns():
    model = tiny().train()
    calibrate(model, [token_ids()], ActivationTaylor())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def constant_updates(criterion, steps, value=1.0):
    group = Group(name="g", kind="mlp", num_units=2, slices=(Slice(module="m", side="in"),))
    total = criterion.new_sum(2, torch.device("cpu"))
    ones = torch.full((1, 1, 2), value, dtype=torch.bfloat16)
    batch = BatchInfo(num_sequences=1, num_tokens=torch.tensor([1]), padding=None)
    signal = Signal(input=ones, grad=torch.ones_like(ones), weight=torch.empty(3, 2))
    for _ in range(steps):
        total.add(criterion.rows(group, {group.slices[0]: signal}, batch, {})["units"])
    totals = Totals(num_tokens=1, num_sequences=1)
    return criterion.score(group, Sums(rows={"units": total.total()}, moments={}, totals=totals, weights=list))


def test_official_bfloat16_sum_stalls_and_ours_does_not():
    """A bfloat16 sum of ones stops growing at 256; the exact sum reaches 1024."""
    assert constant_updates(ActivationTaylor(compat="official"), 1024).tolist() == [256.0, 256.0]
    assert constant_updates(ActivationTaylor(), 1024).tolist() == [1024.0, 1024.0]


def test_official_and_exact_agree_on_the_scale():
    batches = [token_ids(1, 8, seed=s) for s in range(4)]
    official = calibrate(tiny(), batches, ActivationTaylor(compat="official", weighting="sequence")).scores()
    exact = calibrate(tiny(), batches, ActivationTaylor(weighting="sequence")).scores()
    # value, gradient, product, sum over tokens and four sequences: eight roundings, each of at most eps / 2
    bound = 8 * torch.finfo(torch.bfloat16).eps / 2
    for name in exact:
        torch.testing.assert_close(official[name].double(), exact[name].double(), rtol=bound, atol=0)
        assert float(official[name].sum()) == pytest.approx(float(exact[name].sum()), rel=5e-3)  # they average out


def test_units_of_several_channels_are_summed_before_the_absolute_value():
    group = Group(name="g", kind="mlp", num_units=2, slices=(Slice(module="m", side="in", offset=1, width=2),))
    criterion = ActivationTaylor()
    values = torch.tensor([[[9.0, 1.0, -3.0, 2.0, 2.0, 9.0]]])
    signal = Signal(input=values, grad=torch.ones_like(values), weight=torch.empty(1, 6))
    batch = BatchInfo(num_sequences=1, num_tokens=torch.tensor([1]), padding=None)
    assert criterion.rows(group, {group.slices[0]: signal}, batch, {})["units"].tolist() == [[2.0, 4.0]]


def test_nan_weights_are_named_by_layer():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"objective is nan.*model\.layers\.1\.mlp"):
        calibrate(model, [token_ids()], ActivationTaylor())


def test_overflowing_gradient_is_named_by_layer():
    model = tiny()
    model.model.layers[1].mlp.down_proj.register_full_backward_hook(lambda m, gi, go: (gi[0] * float("inf"),))
    with pytest.raises(CalibrationError, match=r"scores of model\.layers\.1\.mlp are not finite"):
        calibrate(model, [token_ids()], ActivationTaylor())


def test_zero_scores_and_no_tokens_are_errors():
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    with pytest.raises(CalibrationError, match=r"All scores of model\.layers\.2\.mlp are zero"):
        calibrate(model, [token_ids()], ActivationTaylor()).scores()
    with pytest.raises(CalibrationError, match="saw no token"):
        calibrate(tiny(), [], ActivationTaylor()).scores()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"reduction": "tokenwise"}, "reduction='tokenwise' is unknown"),
        ({"weighting": "batch"}, "weighting='batch' is unknown"),
        ({"compat": "theirs"}, "compat='theirs' is unknown"),
        ({"compat": "official", "reduction": "signed"}, "per_token"),
    ],
)
def test_settings_are_checked(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        ActivationTaylor(**kwargs)


def test_one_forward_pass_serves_several_objectives_and_criteria():
    """Each pair gets what it gets alone; padding and labels differ between the objectives."""
    model = tiny("llama_untied_bias")
    groups = find_groups(model)
    batches = [padded([token_ids(1, n, seed=n)[0] for n in lengths], "left") for lengths in ((5, 9), (7, 3))]
    pairs = [
        ("entropy", ActivationTaylor()),
        ("cross_entropy", ActivationTaylor(reduction="signed")),
        ("entropy", WeightTaylor()),
    ]
    several = [ImportanceAccumulator(model, groups, criterion) for _, criterion in pairs]
    with ExitStack() as stack:
        for accumulator in several:
            stack.enter_context(accumulator.recording())
        for ids, mask in batches:
            batch = {"input_ids": ids, "attention_mask": mask}
            names = ["entropy", "cross_entropy"]
            with torch.enable_grad():
                found = objective_sums(model, [OBJECTIVES.get(name) for name in names], batch)
            for index, (name, (total, valid)) in enumerate(zip(names, found, strict=True)):
                out = ObjectiveSum(total=total, num_tokens=valid.sum(1), padding=mask == 0)
                mine = [a for a, (objective, _) in zip(several, pairs, strict=True) if objective == name]
                backward(out, mine, retain_graph=index == 0)
    for accumulator, (name, criterion) in zip(several, pairs, strict=True):
        alone = calibrate(model, batches, criterion, name)
        assert accumulator.mean_objective() == pytest.approx(alone.mean_objective(), rel=1e-12)
        for group in groups:
            torch.testing.assert_close(
                accumulator.scores()[group.name], alone.scores()[group.name], rtol=1e-10, atol=1e-14
            )
