"""Tables derived from behaviour: they equal the written ones in effect, and a stranger's class needs none."""

import json
from dataclasses import replace

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, LlamaConfig

import hfprune
from hfprune.models import (
    ARCHITECTURES,
    ArchSpec,
    SliceTemplate,
    config_values,
    find_groups,
    find_spec,
    proof_cache,
    register,
)
from hfprune.models.derivation import derive
from hfprune.models.groups import pin_spec
from hfprune.models.twins import twin
from hfprune.utils.errors import UnsupportedArchitectureError
from tests.helpers.models import COMMON, GATED, NAMES, configs, table, tiny, token_ids
from tests.helpers.stranger import Feed, Mix, StrangerConfig, StrangerLM

TABLES = {table(name).model_class: name for name in NAMES if "350m" not in name}
"""Class with a written table -> name of a tiny model."""

ALIKE = ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")
"""Classes with the structure of Llama or Gemma 2."""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """Proofs are made in the test session, not read from the user's cache."""
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "proofs"))


@pytest.fixture
def stranger():
    torch.manual_seed(0)
    model = StrangerLM(StrangerConfig(channels=32, depth=4, neurons=40)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def effect(model, spec):
    """Returns what a table does to a model: groups, and config keys after pruning, by the names of the config."""
    pinned = type(model)(model.config).to(model.dtype)
    pin_spec(pinned, spec)
    kinds = ("mlp", "heads", "layers")
    groups = find_groups(pinned, kinds)
    keep = {g.name: range(max(g.num_units // 2, 1)) for g in groups}
    names = model.config.attribute_map
    values = {names.get(key, key): value for key, value in config_values(pinned, groups, keep).items()}
    slices = {g.name: {(s.module, s.side, s.offset, s.width) for s in g.slices} for g in groups}
    return slices, [(g.kind, g.num_units) for g in groups], values


def stream_facts(spec, model):
    """Returns what a table says about the residual stream; attributes that no module has are left out."""
    stream, layer = spec.stream, spec.find_layers(model)[0]
    held = {
        path for path in stream.attributes if hasattr(layer.get_submodule(path.rpartition(".")[0]), path.split(".")[-1])
    }
    return replace(stream, norms=tuple(sorted(stream.norms)), attributes=tuple(sorted(held)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (kind in ALIKE)) for kind, name in sorted(TABLES.items())]
)
def test_derivation_says_what_the_table_says(name):
    """The table is not looked at: the class is derived from a twin, and read off on another model."""
    model, written = tiny(name), table(name)
    derived = derive(twin(model.config))
    assert effect(model, derived) == effect(model, written)
    for field in ("backbone", "layers", "lm_head", "scale_key"):
        assert getattr(derived, field) == getattr(written, field)
    capped = written.softcap_key and getattr(model.config, written.softcap_key) is not None
    assert derived.softcap_key == (written.softcap_key if capped else None)
    if written.stream is None:
        assert derived.no_stream
        assert written.no_stream.startswith(derived.no_stream)
    else:
        assert stream_facts(derived, model) == stream_facts(written, model)


def test_scale_of_the_logits_is_found_with_its_direction():
    granite = derive(twin(GraniteConfig(**GATED, logits_scaling=8.0)))
    assert (granite.scale_key, granite.scale_divides) == ("logits_scaling", True)
    cohere = derive(twin(AutoConfig.for_model("cohere", **GATED, logit_scale=0.25)))
    assert (cohere.scale_key, cohere.scale_divides) == ("logit_scale", False)


def test_stranger_is_described_by_its_behaviour(stranger):
    spec = find_spec(stranger)
    assert spec.layers == "trunk.blocks"
    assert (spec.width_key, spec.layers_key, spec.scale_key) == ("neurons", "depth", "softness")
    assert (spec.attention.heads_key, spec.attention.keys_values_key) == ("queries", "memories")
    groups = find_groups(stranger, ("mlp", "heads", "layers"))
    assert [(g.kind, g.num_units) for g in groups] == [("mlp", 40)] * 4 + [("heads", 3)] * 4 + [("layers", 4)]
    qkv = next(s for s in groups[4].slices if s.module.endswith("mix.qkv"))
    assert (qkv.offset, qkv.width) == (0, (2 + 2) * 8)


def test_stranger_is_described_while_another_model_is_built(tmp_path, monkeypatch):
    """The first look-up may be within a context: the meta device, another default type, inference, autocast."""
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(proof_cache, "_KNOWN", {})
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        large = StrangerLM(
            StrangerConfig(channels=512, depth=12, neurons=2048, queries=16, memories=8, per_head=32, vocab_size=999)
        )
        groups = find_groups(large, ("mlp", "heads"))
    assert torch.get_default_dtype() == torch.bfloat16
    torch.set_default_dtype(torch.float32)
    assert [g.num_units for g in groups] == [2048] * 12 + [8] * 12
    assert torch.equal(torch.get_rng_state(), state)


def test_stranger_is_pruned_without_a_table(stranger, tmp_path):
    batches = [token_ids(seed=seed) for seed in range(2)]
    scores = hfprune.score(stranger, batches, objective="entropy", units=("mlp", "heads"))
    plan = hfprune.make_plan(stranger, scores, budget=0.25)
    before = sum(p.numel() for p in stranger.parameters())
    hfprune.apply_plan(stranger, plan)
    after = sum(p.numel() for p in stranger.parameters())
    assert 0.2 < 1 - after / before < 0.3
    assert stranger.config.neurons == stranger.trunk.blocks[0].ff.w_out.in_features < 40
    assert torch.isfinite(stranger(token_ids()).logits).all()
    hfprune.save(stranger, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["neurons"] == stranger.config.neurons
    again = StrangerLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(token_ids()).logits, stranger(token_ids()).logits)


class Tuner(LightningModule):
    """A LightningModule that owns a stranger's model."""

    def __init__(self, model):
        super().__init__()
        self.net = model

    def training_step(self, batch, _):
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_stranger_is_pruned_by_the_callback(stranger):
    prune = hfprune.TaylorImportanceCallback(
        pruning_ratio=0.2, objective="entropy", recovery="full", calibration_batches=2
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        callbacks=[prune],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Tuner(stranger.train())
    trainer.fit(module, DataLoader(list(token_ids(4)), batch_size=2))
    assert module.net.config.neurons == module.net.trunk.blocks[2].ff.w_gate.out_features < 40


def broken(config=None, **parts):
    """Returns a stranger whose layers have other parts."""

    class Broken(StrangerLM):
        def __init__(self, config):
            super().__init__(config)
            for block in self.trunk.blocks:
                for name, kind in parts.items():
                    setattr(block, name, kind(config))

    return Broken(config or StrangerConfig()).double().eval()


class Normed(Feed):
    """Has a norm over all neurons."""

    def forward(self, x):
        return self.w_out(torch.nn.functional.rms_norm(self.w_in(x) * torch.sigmoid(self.w_gate(x)), (20,)))


class Twice(Feed):
    """Runs two times in a forward pass, so that its projections are not traced."""

    def forward(self, x):
        return super().forward(x) + super().forward(-0.5 * x)


NEURONS = (
    SliceTemplate(module="ff.w_in", side="out"),
    SliceTemplate(module="ff.w_gate", side="out"),
    SliceTemplate(module="ff.w_out", side="in"),
)


class ReadTwice(Feed):
    """Its neurons have a second reader."""

    def __init__(self, config):
        super().__init__(config)
        self.also = nn.Linear(config.neurons, config.channels)

    def forward(self, x):
        hidden = self.w_in(x)
        return self.w_out(hidden * torch.sigmoid(self.w_gate(x))) + self.also(hidden)


class Shuffled(Mix):
    """The heads of its output come in another order than their keys."""

    def __init__(self, config):
        super().__init__(config)
        self.out = nn.Sequential(Turned(), self.out)


class Turned(nn.Module):
    def forward(self, x):
        return x.unflatten(-1, (6, 8))[..., [0, 2, 1, 3, 5, 4], :].flatten(-2)


class InFours(Mix):
    """Four partitions of heads, each with its queries, values and keys (CodeGen): with four heads, one per partition."""

    def __init__(self, config):
        super().__init__(config)
        self.qkv = nn.Linear(config.channels, 3 * config.queries * self.size)

    def forward(self, x, allowed):
        q, v, k = self.qkv(x).unflatten(-1, (4, 3, -1, self.size)).unbind(-3)
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT / self.size**0.5).masked_fill(~allowed, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_order_of_heads_that_depends_on_their_number_is_refused():
    """With four heads, the partitions look like interleaved heads; with eight, they do not."""
    spec = derive(broken(StrangerConfig(queries=4, memories=4), mix=InFours))
    assert spec.no_attention == "the order of its heads depends on their number"


@pytest.mark.parametrize(
    ("parts", "field", "reason"),
    [
        ({"ff": Normed}, "no_mlp", "not computed channel by channel"),
        ({"ff": ReadTwice}, "no_mlp", "has several readers"),
        ({"mix": Shuffled}, "no_attention", "order of the heads"),
    ],
)
def test_units_that_are_not_independent_are_refused_with_the_reason(parts, field, reason):
    """The other unit kinds are still derived."""
    spec = derive(broken(**parts))
    assert reason in getattr(spec, field)
    assert bool(spec.mlp) != (field == "no_mlp")
    assert (spec.attention is not None) != (field == "no_attention")


def test_logits_that_no_config_value_explains_are_refused():
    class Louder(StrangerLM):
        def forward(self, input_ids, **kwargs):
            found = super().forward(input_ids, **kwargs)
            found.logits = found.logits * 3.7
            return found

    with pytest.raises(UnsupportedArchitectureError, match="Louder cannot be described: .* gives its logits"):
        derive(Louder(StrangerConfig()).double().eval())


def test_norm_over_all_heads_is_named():
    spec = derive(twin(AutoConfig.for_model("olmo2")))
    assert spec.attention is None
    assert "mixes all heads" in spec.no_attention
    assert spec.mlp
    assert not spec.no_layers


def test_registered_table_is_proven_before_its_first_use():
    """A table without the gate is refused for neurons, with the reason; what it says of heads holds."""
    wrong = replace(
        ARCHITECTURES.get("LlamaForCausalLM"),
        model_class="OlmoForCausalLM",
        mlp=(SliceTemplate(module="mlp.up_proj", side="out"), SliceTemplate(module="mlp.down_proj", side="in")),
        stream=None,
    )
    config = AutoConfig.for_model("olmo", **COMMON | GATED)
    register(wrong)
    try:
        model = AutoModelForCausalLM.from_config(config)
        assert find_groups(model, ("heads",))[0].num_units == 2
        with pytest.raises(UnsupportedArchitectureError, match="MLP neurons of OlmoForCausalLM cannot be removed"):
            find_groups(model)
    finally:
        ARCHITECTURES.remove("OlmoForCausalLM")
    assert find_groups(AutoModelForCausalLM.from_config(config))[0].num_units == 24  # derived


def test_class_that_cannot_be_derived_takes_one_table():
    """Neurons of an MLP that runs twice are not found; a table says where they are, in one call, and is proven."""
    model = broken(ff=Twice)
    with pytest.raises(UnsupportedArchitectureError, match="MLP neurons of Broken cannot be removed"):
        find_groups(model)
    spec = replace(find_spec(model), no_mlp="", width_key="neurons", mlp=NEURONS)
    try:
        register(spec)
        assert [g.num_units for g in find_groups(model)] == [20] * 3
    finally:
        ARCHITECTURES.remove("Broken")


def test_reason_is_in_the_message():
    class Silent(StrangerLM):
        def forward(self, input_ids, **kwargs):
            found = super().forward(input_ids, **kwargs)
            found.logits = found.logits.log_softmax(-1)
            return found

    model = Silent(StrangerConfig())
    with pytest.raises(UnsupportedArchitectureError, match="none could be derived: .*register"):
        find_groups(model)


def test_derivation_leaves_the_model_as_it_was():
    model = twin(LlamaConfig(num_key_value_heads=8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert isinstance(derive(model), ArchSpec)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_list_of_tiny_models_is_complete():
    assert set(TABLES) == {table(name).model_class for name in configs()}
