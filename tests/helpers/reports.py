"""Contents of a report for the tests of pages and figures."""

import functools
from html.parser import HTMLParser

import numpy as np

from hfprune.report import (
    ConvergencePoint,
    FrontierPoint,
    Generation,
    ReportData,
    render,
)

LAYERS, UNITS = 30, 48


def stage(parameters, perplexity, kl, accuracy):
    tasks = {f"task_{i}": {"acc": accuracy + i / 50, "acc_stderr": 0.01} for i in range(10)}
    tasks["harder"] = {"acc": 0.1, "acc_norm": accuracy, "acc_norm_stderr": 0.02}
    return {
        "parameters": parameters,
        "width": parameters // 90_000,
        "perplexity": {"value": perplexity, "protocol": "some text: 3 windows"},
        "fidelity": {
            "kl": kl,
            "kl_stderr": kl / 10,
            "top1_agreement": 1 - kl,
            "kl_by_position": [kl * (1 + 1 / (i + 1)) for i in range(64)],
        },
        "latency": {
            "prefill_ms": parameters / 1e6,
            "prefill_spread_ms": [parameters / 1.1e6, parameters / 0.9e6],
            "decode_tokens_per_s": 31.0,
            "device": "cpu",
            "threads": 2,
            "prompt_tokens": 256,
            "new_tokens": 16,
            "repeats": 5,
        },
        "size": {"bytes": 2 * parameters, "macs": 3 * parameters, "kv_cache_bytes": 2**20},
        "zero_shot": {"tasks": tasks, "average": accuracy},
    }


def full(**changes):
    rng = np.random.default_rng(0)
    groups = [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    data = {
        "title": "A run & its <title>",
        "commands": ["hfprune prune --model.path=some/model --output_dir='my folder'"],
        "stages": {
            "dense": stage(134_515_008, 19.4, 0.0, 0.46),
            "pruned": stage(107_612_006, 29.19, 0.33, 0.41),
            "recovered": stage(107_612_006, 22.8, 0.17, 0.44),
        },
        "importance": {name: list(rng.lognormal(-5, 1, UNITS)) for name in groups},
        "kept": {name: (24 + i % 3, UNITS) for i, name in enumerate(groups)},
        "convergence": [ConvergencePoint(tokens=t, overlap=o) for t, o in ((4096, 0.9), (1024, 0.8), (65536, 1.0))],
        "frontier": [
            FrontierPoint(
                label=f"{series} {share:.0%}",
                series=series,
                parameters=int(134e6 * (1 - share)),
                latency_ms=100 * (1 - share),
                perplexity=20 + 100 * share,
                kl=2 * share,
                accuracy=0.46 - share / 2,
                spread={"perplexity": (19 + 100 * share, 23 + 100 * share)},
            )
            for series in ("entropy", "cross-entropy")
            for share in (0.4, 0.1, 0.2)
        ],
        "generations": [
            Generation(
                prompt="Once <b>upon</b>", texts={"dense": "a time\n  it", "pruned": "<script>alert(1)</script>"}
            )
        ],
        "facts": {"Seed": "42", "Budget": "pruning_ratio=0.2"},
        "warnings": ["PERPLEXITY EXPLODED: <look>", "and another"],
    }
    return ReportData(**data | changes)


@functools.cache
def full_page():
    return render(full())


class Page(HTMLParser):
    """Collects what the tests ask of a page; text by the innermost open tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source", "wbr", "br"):
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
