"""LightningModules as their authors would write them: nothing of hfprune in them."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.helpers.models import tiny, token_ids


class TokenData(Dataset):
    """Dictionaries as a Hugging Face collator gives them."""

    def __init__(self, size=24, length=12, seed=0):
        self.ids = token_ids(size, length, seed=seed)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class FineTuner(L.LightningModule):
    """Fine-tunes a Hugging Face model somewhere inside, with a schedule and metrics."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.ModuleDict({"lm": tiny(dtype=torch.float32, seed=1).train()})
        self.dropout = nn.Dropout(0.1)

    def training_step(self, batch, batch_idx):
        out = self.net["lm"](**batch)
        self.log("train/loss", out.loss, prog_bar=True)
        self.log_dict({"train/ppl": out.loss.detach().exp()}, on_step=False, on_epoch=True)
        return {"loss": out.loss, "logits": out.logits.detach()}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net["lm"](**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        return DataLoader(TokenData(), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TokenData(size=4, seed=9), batch_size=4)


class LateFineTuner(FineTuner):
    """Makes its model in ``configure_model``, as large ones do."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.ModuleDict({"lm": tiny(dtype=torch.float32, seed=1).train()})


class ManualFineTuner(FineTuner):
    """Steps its optimizer by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = self.net["lm"](**batch).loss
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        scheduler.step()
        self.log("train/loss", loss)


class PointData(Dataset):
    """Two classes, apart by the sign of a product."""

    def __init__(self, size=128, features=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, features, generator=generator)
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Classifier(L.LightningModule):
    """A plain MLP, two hidden layers of different widths."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 2)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class EncoderBlock(nn.Module):
    """A block of torchvision's vision transformer: pre-norm, its MLP an ``nn.Sequential`` with dropout between."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, dim), nn.Dropout(0.1)
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(L.LightningModule):
    """Classifies 8 x 8 images by patches."""

    def __init__(self, dim=16, layers=3):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=4, stride=4)
        self.encoder = nn.ModuleDict({f"layer_{i}": EncoderBlock(dim, 2, 40) for i in range(layers)})
        self.head = nn.Linear(dim, 3)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.encoder.values():
            x = block(x)
        return self.head(x.mean(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=0.1)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Block(nn.Module):
    """A nanoGPT-style block."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2, self.heads = nn.LayerNorm(dim), nn.LayerNorm(dim), heads
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(dim, 3 * dim), "c_proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim, bias=False), "c_proj": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (
            y.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for y in self.attn["c_attn"](self.ln_1(x)).split(d, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(L.LightningModule):
    """A GPT of one's own, trained on pairs (x, y) of shifted tokens."""

    def __init__(self, vocab=61, dim=16, layers=2):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, dim),
                "wpe": nn.Embedding(32, dim),
                "h": nn.ModuleList([Block(dim, 2) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx):
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1], device=idx.device))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        return torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3
        )


def images(size=24):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator)
    return torch.utils.data.TensorDataset(x, y)


def shifted(size=24):
    ids = token_ids(size, 13)
    return torch.utils.data.TensorDataset(ids[:, :-1], ids[:, 1:])
