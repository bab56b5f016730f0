"""Every writer of the package, each with two contents; and faults at any step of a write.

``main`` is run by ``tests.helpers.warm``, in a process that a fault may kill.
"""

import os
import signal
from pathlib import Path

import safetensors.torch
import torch

from hfprune.callbacks.checkpointing import AtomicCheckpointIO
from hfprune.data.examples import ExampleStore, digest
from hfprune.evaluation.cache import cached_reference
from hfprune.io.save import export_model, save_importance
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.recovery.teacher_cache import TeacherCache
from hfprune.report import ReportData, write_report
from hfprune.sparse.state import LayerState, save_orders
from hfprune.utils.files import OwnFolder, replaced_folder, write_bytes, write_json, write_tensors, write_text
from tests.helpers.models import tiny, token_ids

CONTENTS = (1, 2)
FOREIGN = "notes of mine.txt"
STEPS = ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "chmod"))


def _plan(number):
    return PruningPlan(model_class="M", groups=(), keep={}, config={}, provenance={"number": number})


def _adapter(folder, number):
    with replaced_folder(folder / "adapter") as stage:
        (stage / "adapter_config.json").write_text(str(number))


def _teacher(folder, number):
    cache = TeacherCache(folder, fingerprint="f", top_k=2, temperature=1.0)
    row = torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 2, dtype=torch.int32), torch.full((1,), float(number))
    if f"row{number}" not in cache:
        cache._write({f"row{number}": row})


def _rows(folder):
    cache = TeacherCache(folder, fingerprint="f", top_k=2, temperature=1.0)
    return {name: cache._row(name)[2].item() for name in cache._where}


def _examples(folder, number):
    ExampleStore(folder, digest("same")).save([([number, 2], [number, 2])], {})


def _state(folder, number):
    LayerState(folder / "state", {"a": 1}).save("layer", {"w": torch.full((2,), float(number))}, {"error": number})


def _model(folder, number):
    export_model(tiny(seed=number, dtype=torch.float32), None, _plan(number), folder / "model", overwrite=True)


def _reference(folder, number):
    model = tiny(dtype=torch.float32)
    cached_reference(folder, model, token_ids(batch=number), top_k=2)


WRITERS = {
    "text": lambda folder, n: write_text(folder / "a.md", f"text {n}"),
    "bytes": lambda folder, n: write_bytes(folder / "a.png", bytes([n])),
    "json": lambda folder, n: write_json(folder / "report.json", {"stages": n}),
    "page": lambda folder, n: write_report(ReportData(title=f"run {n}"), folder / "report.html"),
    "plan": lambda folder, n: _plan(n).save(folder / PLAN_FILE),
    "importance": lambda folder, n: save_importance({"g": torch.full((3,), float(n))}, folder),
    "orders": lambda folder, n: save_orders({"0.q": torch.arange(n)}, folder),
    "tensors": lambda folder, n: write_tensors(folder / "s.unfinished", {"w": torch.full((2,), n)}, {"key": "k"}),
    "examples": _examples,
    "reference": _reference,
    "teacher": _teacher,
    "state": _state,
    "settings": lambda folder, n: LayerState(folder / "state", {"a": n}, fresh=True),
    "own": lambda folder, n: OwnFolder(folder / "own").file(f"{n}.bin").write_bytes(b"x"),
    "checkpoint": lambda folder, n: AtomicCheckpointIO().save_checkpoint({"n": n}, folder / "a.ckpt"),
    "adapter": _adapter,
    "model": _model,
}


def content(name, folder):
    """What a writer's folder holds, without stages and what others put there."""
    if name == "teacher":
        return _rows(folder)
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != FOREIGN)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if ".hfprune/" not in f"{path.parent}/"}


class Fault:
    """Fails at one step of a write: at a rename, a sync, a new folder, a changed mode, or in half a file.

    Attributes:
        hit: Whether there were so many steps.
    """

    def __init__(self, step, *, kill):
        self._left, self._kill, self.hit = step, kill, False

    def install(self, monkeypatch):
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, self._failing(getattr(owner, name)))
        monkeypatch.setattr(safetensors.torch, "save_file", self._half(safetensors.torch.save_file))
        monkeypatch.setattr(torch, "save", self._half(torch.save))
        monkeypatch.setattr(Path, "write_bytes", self._failing(Path.write_bytes))

    def _step(self, leave=lambda: None):
        self._left -= 1
        if self._left == 0:
            self.hit = True
            leave()
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")

    def _failing(self, function):
        def call(*args, **kwargs):
            self._step()
            return function(*args, **kwargs)

        return call

    def _half(self, function):
        def call(data, file, **kwargs):
            def leave():
                with open(file, "wb") if isinstance(file, Path) else file as opened:
                    opened.write(b"half")

            self._step(leave)
            return function(data, file, **kwargs)

        return call


class _Patch:
    def setattr(self, owner, name, value):
        setattr(owner, name, value)


def main(name, folder, step):
    """Writes the second content and is killed at a step; ends well where there are fewer."""
    Fault(step, kill=True).install(_Patch())
    WRITERS[name](Path(folder), CONTENTS[1])
