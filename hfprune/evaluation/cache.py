"""Cache of the dense model's predictions: the top K logits and the log-sum-exp of every token.

Later comparisons on the same windows do not run the dense model. 40 windows of 512 tokens take 42 MB at K = 256; all
logits would take 4 GB (V = 49,152).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune.evaluation.divergence import TopK
from hfprune.evaluation.fidelity import TopKReference
from hfprune.evaluation.perplexity import ScoredLogits, Windows
from hfprune.models import output_head
from hfprune.models.fingerprint import prediction_fingerprint
from hfprune.models.forward import window_hidden
from hfprune.objectives.chunked import chunk_tokens
from hfprune.objectives.top_k_store import TopKFile
from hfprune.utils.errors import ConfigError

DEFAULT_TOP_K = 256

_PARTS = ("windows", "logits", "indices", "lse", "nll", "vocab_size")


def cached_reference(
    folder: str | Path, model: nn.Module, windows: Tensor | Windows, *, top_k: int = DEFAULT_TOP_K
) -> TopKReference:
    """Returns the reference of a dense model on ``windows``, cached in ``folder``.

    The file name identifies model, windows and K. Files are written atomically.

    Args:
        folder: Folder of the files; created if missing.
        model: The dense model.
        windows: Token ids [N, W], or windows with their protocol.
        top_k: K.

    Raises:
        ConfigError: A file is damaged, or K is not positive.
        OutputError: A file could not be written.
    """
    if top_k < 1:
        raise ConfigError(f"top_k={top_k} must be positive.")
    found = Windows.of(windows)
    shape = "x".join(map(str, found.ids.shape))  # the digest does not depend on the shape
    name = f"{prediction_fingerprint(model)}-{found.sha256[:16]}-{shape}-{top_k}.safetensors"
    path = Path(folder) / name
    if path.is_file():
        return _load(path, found)
    reference = collect_top_k(model, found, top_k=top_k)
    _save(path, reference)
    return reference


def collect_top_k(model: nn.Module, windows: Tensor | Windows, *, top_k: int = DEFAULT_TOP_K) -> TopKReference:
    """Returns the top K logits of ``model`` on ``windows`` [N, W], computed for one chunk of tokens at a time."""
    found = Windows.of(windows)
    head = output_head(model)
    size = chunk_tokens(head.weight.shape[0])
    parts: list[TopK] = []
    nll: list[Tensor] = []
    with torch.no_grad():
        for window in found.ids:
            logits = ScoredLogits(head, window_hidden(model, window[None])[0], window)
            nll.append(logits.nll)
            parts += [TopK.of(logits[start : start + size], top_k) for start in range(0, len(logits), size)]
    shape = found.ids.shape
    top = TopK(
        logits=torch.cat([p.logits.cpu() for p in parts]).unflatten(0, shape),
        indices=torch.cat([p.indices.cpu() for p in parts]).unflatten(0, shape),
        lse=torch.cat([p.lse.cpu() for p in parts]).unflatten(0, shape),
    )
    return TopKReference(windows=found, top=top, nll=torch.stack(nll), vocab_size=int(head.weight.shape[0]))


def _save(path: Path, reference: TopKReference) -> None:
    top = reference.top
    tensors = (
        reference.windows.ids.to(torch.int32),
        top.logits,
        top.indices.to(torch.int32),
        top.lse,
        reference.nll,
        torch.tensor(reference.vocab_size),
    )
    TopKFile.write(path, {"": dict(zip(_PARTS, tensors, strict=True))})


def _load(path: Path, windows: Windows) -> TopKReference:
    ids, logits, indices, lse, nll, vocab_size = TopKFile(path).read("", _PARTS)
    if not torch.equal(ids.long(), windows.ids):
        raise ConfigError(f"The cached predictions '{path}' belong to other windows: delete the file.")
    top = TopK(logits=logits, indices=indices.long(), lse=lse)
    return TopKReference(windows=windows, top=top, nll=nll, vocab_size=int(vocab_size))
