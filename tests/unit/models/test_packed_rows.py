"""Documents packed into one row: nothing of one is seen from another, for every architecture and attention."""

import pytest
import torch

from hfprune.models import backbone
from hfprune.models.forward import (
    VARLEN,
    _with_padding_apart,
    check_packing,
    forward_packed,
    objective_sum,
    objective_sums,
)
from hfprune.objectives import OBJECTIVES
from hfprune.utils.errors import UnsupportedArchitectureError
from tests.helpers.models import NAMES, tiny, token_ids

LENGTHS = ((5, 9, 1, 12), (11, 7), (20,))
"""Documents of three rows; longer than the sliding windows of 8, and one of a single token."""


def documents():
    return [
        [token_ids(1, n, seed=97 * row + i)[0] for i, n in enumerate(lengths)] for row, lengths in enumerate(LENGTHS)
    ]


def pack(rows, *, side="right"):
    """The rows as one batch; padding holds a real token id and a senseless position."""
    longest = max(sum(map(len, row)) for row in rows)
    batch = {"input_ids": torch.full((len(rows), longest), 7), "position_ids": torch.full((len(rows), longest), 3)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for index, row in enumerate(rows):
        size = sum(map(len, row))
        where = slice(0, size) if side == "right" else slice(longest - size, longest)
        batch["input_ids"][index, where] = torch.cat(row)
        batch["position_ids"][index, where] = torch.cat([torch.arange(len(d)) for d in row])
        batch["attention_mask"][index, where] = 1
    return batch


def logits(model, batch):
    hidden = forward_packed(model, batch["input_ids"], batch["position_ids"], batch["attention_mask"])
    return model.lm_head(hidden)


def alone(model, ids):
    return model.lm_head(backbone(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0])


KINDS = [(name, "sdpa") for name in NAMES if name != "gemma2"]  # it caps its attention logits, which sdpa cannot
KINDS += [(name, "eager") for name in ("gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "opt")]

TOLERANCE = {"sdpa": 1e-10, "eager": 1e-7}
"""Nats per token; eager attention takes its softmax in float32 whatever the model's type."""


@pytest.fixture(params=KINDS, ids="-".join)
def model(request):
    name, attention = request.param
    found = tiny(name)
    found.set_attn_implementation(attention)
    return found


@torch.no_grad()
def test_packed_loss_is_the_unpacked_loss(model):
    """Sum and count of every objective that draws nothing; labels are not given, so borders must be found."""
    rows = documents()
    batch = pack(rows)
    names = sorted(set(OBJECTIVES) - {"sampled"})  # its labels follow from the row; calibration takes rows apart
    found = objective_sums(model, [OBJECTIVES.get(name) for name in names], batch)
    for name, (total, valid) in zip(names, found, strict=True):
        parts = [objective_sum(model, OBJECTIVES.get(name), {"input_ids": d[None]}) for row in rows for d in row]
        count = sum(int(v.sum()) for _, v in parts)
        assert int(valid.sum()) == count
        assert abs(float(total - sum(part for part, _ in parts))) / count < TOLERANCE[model.config._attn_implementation]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_document_sees_itself_alone(model, side):
    """Another first document leaves the logits of the others as they were, to the last bit, and changes its own."""
    rows = documents()
    before = logits(model, pack(rows, side=side))
    changed = [[token_ids(1, 5, seed=5)[0], *rows[0][1:]], *rows[1:]]
    after = logits(model, pack(changed, side=side))
    assert torch.equal(after[0, 5:], before[0, 5:])
    assert torch.equal(after[1:], before[1:])
    assert not torch.isclose(after[0, :5], before[0, :5]).all()
    tolerance = 100 * TOLERANCE[model.config._attn_implementation]
    torch.testing.assert_close(after[0, 5:14], alone(model, rows[0][1]), rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3_groups", "gpt_oss", "llama4", "olmoe"])
def test_documents_of_mixtures_are_kept_apart(name):
    """gpt-oss needs a mask for each type of layer; the documents are longer than its sliding window."""
    model, rows = tiny(name), documents()
    found = logits(model, pack(rows))
    for row, kept in zip(found, rows, strict=True):
        start = 0
        for document in kept:
            expected = alone(model, document)
            torch.testing.assert_close(row[start : start + len(document)], expected, rtol=0, atol=1e-5)
            start += len(document)


@torch.no_grad()
def test_restarted_positions_alone_do_not_keep_opt_apart():
    """Why OPT is given a mask: with position ids alone its later documents see the earlier ones."""
    model, (row, *_) = tiny("opt"), documents()
    batch = pack([row])
    whole = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, 5:14]
    assert (whole - alone(model, row[1])).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, batch)[0, 5:14], alone(model, row[1]), rtol=0, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_one_long_row_for_varlen_kernels(name, monkeypatch):
    """The layout that FlashAttention needs, computed by sdpa: real tokens in one row give the same hidden states."""
    model, batch = tiny(name), pack(documents())
    expected = logits(model, batch)
    monkeypatch.setattr("hfprune.models.forward.VARLEN", ("sdpa",))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[real], expected[real], rtol=0, atol=1e-10)


def test_labels_at_borders_are_not_targets():
    """Labels given for the first token of a document are not predicted from the document before it."""
    model, batch = tiny("llama"), pack(documents())
    objective = OBJECTIVES.get("cross_entropy")
    with torch.no_grad():
        whole = objective_sum(model, objective, batch)
        labelled = objective_sum(model, objective, batch | {"labels": batch["input_ids"]})
    assert torch.equal(whole[0], labelled[0])
    assert int(labelled[1].sum()) == sum(n - 1 for lengths in LENGTHS for n in lengths)


def test_gradients_of_packed_rows_are_those_of_the_documents():
    model, rows = tiny("qwen3"), documents()
    objective = OBJECTIVES.get("cross_entropy")
    objective_sum(model, objective, pack(rows))[0].backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for document in (d for row in rows for d in row if len(d) > 1):
        objective_sum(model, objective, {"input_ids": document[None]})[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-9, atol=1e-9)


def test_padding_is_a_document_of_its_own():
    real = torch.tensor([[False, True, True, False, False, True, False]])
    positions = torch.tensor([[5, 0, 1, 5, 5, 0, 5]])
    assert _with_padding_apart(positions, real).tolist() == [[0, 0, 1, 0, 1, 0, 0]]


def test_attention_that_is_not_known_is_refused_by_name():
    model = tiny("opt")
    model.config._attn_implementation = VARLEN[0]
    with pytest.raises(UnsupportedArchitectureError, match="OPTForCausalLM with the attention 'flash_attention_2'"):
        check_packing(model)
    model = tiny("llama")
    check_packing(model)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(UnsupportedArchitectureError, match=r"'paged|sdpa' is not known.*packing=False"):
        check_packing(model)
