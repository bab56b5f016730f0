"""Exports in ONNX Runtime, by way of ``torch.onnx``: the recipe of docs/serving.md, layers of any size."""

import os
import re
from pathlib import Path

import pytest

from tests.helpers.served import PROMPTS, difference, export, run_script, servable

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("HFPRUNE_ONNX_PYTHON", "")
needs_onnx = pytest.mark.skipif(not PYTHON, reason="HFPRUNE_ONNX_PYTHON names no python with hfprune and ONNX Runtime")
_COMPARE = """
import json, os, sys
from pathlib import Path
import numpy as np
import onnxruntime
folders, prompts = json.loads(sys.argv[1])
recipe = os.environ["RECIPE"]
found = {}
for folder in folders:
    os.chdir(folder)
    exec(recipe.replace("OUT/model", folder), {})
    session = onnxruntime.InferenceSession("model.onnx")
    logits, tokens = [], []
    for prompt in prompts:
        ids, made = list(prompt), []
        for _ in range(8):
            (output,) = session.run(["logits"], {"input_ids": np.array([ids])})
            if not made:
                logits.append(output[0, -1].tolist())
            made.append(int(output[0, -1].argmax()))
            ids.append(made[-1])
        tokens.append(made)
    found[folder] = [logits, tokens]
print(json.dumps({"version": onnxruntime.__version__, "found": found}))
"""


def recipe():
    """Returns the recipe of the documentation."""
    text = (ROOT / "docs" / "serving.md").read_text()
    return next(block for block in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "torch.onnx" in block)


@needs_onnx
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_logits_and_tokens(tmp_path):
    configs = servable()
    uneven, heads = {"widths": (33, 77, 50, 96)}, {"heads": (1, 2, 1, 2)}
    cases = {name: (config, uneven, "per_layer") for name, config in configs.items()}
    cases["llama_all"] = (configs["llama"], uneven | heads | {"without": (1,)}, "per_layer")
    cases["uniform"] = (configs["llama"], {"widths": (33, 33, 33, 33)}, "uniform")
    exports = {
        name: export(config, tmp_path / name, layout=layout, **units) for name, (config, units, layout) in cases.items()
    }
    folders = [str(export.folder) for export in exports.values()]
    answer = run_script(PYTHON, _COMPARE, [folders, PROMPTS], path=ROOT, RECIPE=recipe())
    for name, expected in exports.items():
        logits, tokens = answer["found"][str(expected.folder)]
        assert tokens == expected.tokens, name
        assert difference(logits, expected.logits) < 1e-4, name
