import random

import pytest

from hfprune.evaluation.overlap import NGRAM, SKETCH_SIZE, Sketch, ngram_hashes


def text(length, seed):
    generator = random.Random(seed)
    return [generator.randrange(50000) for _ in range(length)]


def test_hashes_tell_ngrams_apart():
    ids = text(5000, 0)
    hashes = ngram_hashes(ids)
    assert len(set(hashes.tolist())) == len(ids) - NGRAM + 1
    assert ngram_hashes(ids[7 : 7 + NGRAM]).tolist() == [hashes[7]]
    assert ngram_hashes(ids[: NGRAM - 1]).tolist() == []
    swapped = [*ids[:5], ids[6], ids[5], *ids[7:NGRAM]]
    assert ngram_hashes(swapped)[0] != hashes[0]


def test_small_texts_are_compared_exactly():
    seen = [text(200, 0), text(300, 1)]
    sketch = Sketch.of(seen)
    assert sketch.complete
    assert sketch.share_of(seen) == 1.0
    assert sketch.share_of([text(300, 2)]) == 0.0
    half = [text(200, 3), text(200, 0)]
    assert sketch.share_of(half) == 0.5
    assert sketch.share_of([[1, 2, 3]]) == 0.0


def test_large_texts_are_estimated():
    seen = [text(1000, seed) for seed in range(40)]
    sketch = Sketch.of(seen)
    assert not sketch.complete
    assert len(sketch.hashes) == SKETCH_SIZE
    assert sketch.share_of(seen[:20]) == 1.0
    mixed = [*seen[:10], *(text(1000, seed) for seed in range(100, 130))]
    assert sketch.share_of(mixed) == pytest.approx(0.25, abs=0.06)
    assert sketch.share_of([text(1000, seed) for seed in range(100, 110)]) == 0.0


def test_does_not_depend_on_order():
    seen = [text(1000, seed) for seed in range(10)]
    assert (Sketch.of(seen).hashes == Sketch.of(seen[::-1]).hashes).all()


def test_goes_through_text():
    for sketch in (Sketch.of([text(100, 0)]), Sketch.of([text(5000, 0)]), Sketch.of([])):
        again = Sketch.from_text(sketch.to_text())
        assert (again.hashes == sketch.hashes).all()
        assert again.complete == sketch.complete
    assert Sketch.of([]).share_of([text(100, 0)]) == 0.0
