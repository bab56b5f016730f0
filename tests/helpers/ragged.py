"""Calibration sequences of different lengths, laid out in every way that must not matter."""

import lightning as L
import torch
from torch.utils.data import DataLoader

from tests.helpers.models import token_ids

LENGTHS = (4, 9, 6, 7, 3, 12, 5, 8, 10, 2, 11)


def padded(sequences, side):
    """One row per sequence; padding holds a real token id, so that only the mask can tell."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), 7)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(sequences):
        where = slice(0, len(s)) if side == "right" else slice(longest - len(s), longest)
        ids[row, where], mask[row, where] = s, 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(sequences):
    """All sequences one after another in one row; position ids start again at each."""
    return {
        "input_ids": torch.cat(list(sequences))[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
    }


class RaggedData(L.LightningDataModule):
    """The sequences in batches: ``layout`` is ``left`` or ``right`` (padding), or ``packed``."""

    def __init__(self, batch_size=1, layout="right"):
        super().__init__()
        self.sequences = [token_ids(1, n, seed=n)[0] for n in LENGTHS]
        self.batch_size, self.layout = batch_size, layout

    def calibration_dataloader(self):
        def collate(rows):
            return packed(rows) if self.layout == "packed" else padded(rows, self.layout)

        return DataLoader(self.sequences, batch_size=self.batch_size, collate_fn=collate)
