"""One process, DDP and FSDP2 on two gloo processes: the same kept units, and equal ranks."""

import pytest
import torch

from hfprune import apply_plan, load
from hfprune.io.layouts import is_per_layer
from tests.helpers.models import save_tiny, tiny, tiny_tokenizer
from tests.helpers.plans import mlp_plan
from tests.integration.distributed.runs import STRATEGIES, equal, run, start

SLOW = pytest.mark.slow


@pytest.mark.parametrize("prune_only", [True, False], ids=["prune", "prune_and_lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_agree(undisturbed, strategy, prune_only):
    alone = undisturbed("single", prune_only=True)[0]
    ranks = undisturbed(strategy, prune_only=prune_only)
    for rank in ranks:
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])  # to the last bit
        assert equal(rank["weights"], ranks[0]["weights"])
    if prune_only:
        assert equal(ranks[0]["weights"], alone["weights"])
    else:
        assert ranks[0]["steps"] == 8 // len(ranks)  # 8 sequences, 2 a step on each rank, 2 epochs
        assert any(weight.any() for name, weight in ranks[0]["weights"].items() if "lora_B" in name)


def test_heads_and_layers_under_every_strategy(folder, tmp_path):
    settings = {"units": ["mlp", "heads", "layers"], "pruning_ratio": 0.5}
    alone = run(folder, tmp_path / "single", "single", prune_only=True, **settings)[0]
    assert sorted({len(keep) for keep in alone["keep"].values()}) == [1, 2, 17, 24]  # 24, 2: of the layer that goes
    for strategy in ("ddp", "fsdp2"):
        for rank in run(folder, tmp_path / strategy, strategy, prune_only=True, **settings):
            assert rank["keep"] == alone["keep"]
            assert equal(rank["scores"], alone["scores"])
            assert equal(rank["weights"], alone["weights"])


def test_channels_under_ddp(folder, tmp_path):
    settings = {"units": ["mlp", "channels"], "pruning_ratio": 0.4}
    alone = run(folder, tmp_path / "single", "single", prune_only=True, **settings)[0]
    assert len(alone["keep"]["channels"]) == 12
    for rank in run(folder, tmp_path / "ddp", "ddp", prune_only=True, **settings):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])
        assert equal(rank["weights"], alone["weights"])
    said = start(folder, tmp_path / "fsdp2", "fsdp2", prune_only=True, fails=True, **settings)
    assert "units='channels' is not supported under ModelParallelStrategy" in said


@SLOW
def test_sublayers_under_every_strategy(folder, tmp_path):
    settings = {"units": ["mlp", "attention_sublayers", "mlp_sublayers"], "pruning_ratio": 0.4, "prune_only": True}
    settings |= {"layout": "per_layer"}
    for strategy, depth_scores in (("ddp", "kl"), ("ddp", "cosine"), ("fsdp2", None)):
        alone = run(folder, tmp_path / f"one {depth_scores}", "single", depth_scores=depth_scores, **settings)[0]
        assert any(not keep for name, keep in alone["keep"].items() if "sublayer" in name)
        out = tmp_path / f"{strategy} {depth_scores}"
        for rank in run(folder, out, strategy, depth_scores=depth_scores, **settings):
            assert rank["keep"] == alone["keep"]
            assert equal(rank["weights"], alone["weights"])
        weights = {name: alone["weights"][f"model.{name}"] for name, _ in load(out / "run/model").named_parameters()}
        assert equal(weights, dict(load(out / "run/model", dtype="float64").named_parameters()))
    said = start(folder, tmp_path / "no", "fsdp2", fails=True, depth_scores="kl", **settings)
    assert "depth_scores cannot measure sharded models" in said


@SLOW
def test_experts_under_ddp(tmp_path):
    folder = save_tiny(tmp_path / "dense", "mixtral")
    settings = {"units": ["experts", "heads"], "dtype": "float32", "prune_only": True}
    alone = run(folder, tmp_path / "single", "single", **settings)[0]
    assert sorted({len(keep) for keep in alone["keep"].values()}) == [1, 5]
    for rank in run(folder, tmp_path / "ddp", "ddp", **settings):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])
        assert equal(rank["weights"], alone["weights"])


def test_sharded_training_is_ddp_training(undisturbed):
    """The same steps on whole and on sharded weights, bit for bit; no FSDP2 rank holds more than its share."""
    ddp, fsdp2 = (undisturbed(name, prune_only=False)[0] for name in ("ddp", "fsdp2"))
    assert equal(ddp["weights"], fsdp2["weights"])
    assert fsdp2["local"] <= 0.52 * ddp["local"]


def test_module_of_ones_own_under_ddp(folder, tmp_path):
    """The same kept units from one process and from two, also when two take up what one left in mid-calibration."""
    (alone,) = run(folder, tmp_path / "one", "single", foreign=True)
    ranks = run(folder, tmp_path / "two", "ddp", foreign=True)
    start(folder, tmp_path / "both", "single", foreign=True, die=["calibration", 2])
    resumed = run(folder, tmp_path / "both", "ddp", foreign=True, ckpt_path="last")
    for rank in (*ranks, *resumed):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])
        assert equal(rank["weights"], ranks[0]["weights"])


@SLOW
def test_layers_that_differ_in_width(tmp_path):
    """Read, pruned further, adapted and written shard by shard: what one process does, with both plans beside it."""
    model = tiny(dtype=torch.float32)
    apply_plan(model, mlp_plan(model))
    model.save_pretrained(tmp_path / "ragged")
    tiny_tokenizer().save_pretrained(tmp_path / "ragged")
    settings = {"layout": "per_layer", "allow_pruned": True, "prune_only": True}
    found = {}
    for strategy in ("single", "fsdp2"):
        ranks = run(str(tmp_path / "ragged"), tmp_path / strategy, strategy, **settings)
        found[strategy] = ranks[0]["weights"], load(tmp_path / strategy / "run/model", dtype="float64")
    assert equal(found["single"][0], found["fsdp2"][0])
    for weights, saved in found.values():
        assert equal(
            {name: weights[f"model.{name}"] for name, _ in saved.named_parameters()}, dict(saved.named_parameters())
        )
        assert is_per_layer(saved.config)
    said = start(str(tmp_path / "ragged"), tmp_path / "no", "fsdp2", fails=True, **settings | {"layout": "padded"})
    assert "needs the whole model on one rank" in said


@pytest.fixture(scope="module")
def ragged_alone(folder, tmp_path_factory):
    settings = {"prune_only": True, "report": False, "ragged": [1, "right"]}
    (found,) = run(folder, tmp_path_factory.mktemp("ragged"), "single", **settings)
    return found


@pytest.mark.parametrize(
    ("strategy", "ragged"),
    [
        pytest.param("ddp", [4, "left"], marks=SLOW),
        ("fsdp2", [3, "right"]),
        pytest.param("fsdp2", [11, "packed"], marks=SLOW),
        pytest.param("ddp", [11, "packed"], marks=SLOW),
    ],
)
def test_ragged_sequences_in_uneven_shards(folder, tmp_path, ragged_alone, strategy, ragged):
    """Two ranks give the scores of one, also with 11 sequences, of which one rank gets fewer; singly and in batches."""
    alone = ragged_alone
    for exact in (True, False):
        settings = {"prune_only": True, "report": False, "exact": exact}
        for rank in run(folder, tmp_path / f"two{exact}", strategy, ragged=ragged, **settings):
            assert rank["keep"] == alone["keep"]
            for name, score in alone["scores"].items():
                torch.testing.assert_close(rank["scores"][name], score, atol=0 if exact else 1e-10, rtol=0)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=SLOW), "fsdp2"])
def test_fewer_sequences_than_ranks(folder, tmp_path, strategy):
    (alone,) = run(folder, tmp_path / "one", "single", prune_only=True, sequences=1, report=False)
    for rank in run(folder, tmp_path / "two", strategy, prune_only=True, sequences=1, report=False):
        assert rank["keep"] == alone["keep"]
        assert equal(rank["scores"], alone["scores"])
