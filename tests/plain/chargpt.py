"""The training of examples/chargpt.py as a plain PyTorch program, with its own copy of everything."""

import math
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
import traces
from torch import nn
from torch.nn import functional


def read_text(size):
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8")
        if len(text) >= size:
            break
    return text[:size]


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary, context, layers, heads, width, dropout):
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.characters.weight
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return self.head(self.norm(self.blocks(self.characters(x) + self.places(places))))

    @torch.no_grad()
    def write(self, x, length):
        self.eval()
        for _ in range(length):
            chances = self(x[:, -self.context :])[:, -1].softmax(-1)
            x = torch.cat([x, torch.multinomial(chances, 1)], dim=1)
        return x


def draw(text, batch_size, context):
    starts = torch.randint(len(text) - context, (batch_size,)).tolist()
    x = torch.stack([text[start : start + context] for start in starts])
    y = torch.stack([text[start + 1 : start + 1 + context] for start in starts])
    return x, y


def learning_rate(step, steps, peak):
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    trace,
    steps=400,
    lr=2e-3,
    batch_size=16,
    context=64,
    layers=3,
    heads=4,
    width=96,
    dropout=0.1,
    characters=1_000_000,
    evaluate_every=100,
    evaluate_batches=10,
):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = read_text(characters)
    vocabulary = sorted(set(text))
    number = {character: index for index, character in enumerate(vocabulary)}
    data = torch.tensor([number[character] for character in text])
    training, unseen = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    model = GPT(len(vocabulary), context, layers, heads, width, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)

    def evaluate():
        model.eval()
        losses = []
        with torch.no_grad():
            for _ in range(evaluate_batches):
                x, y = draw(unseen, batch_size, context)
                losses.append(functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
        model.train()
        return sum(losses) / evaluate_batches

    best = math.inf
    for step in range(steps):
        if step % evaluate_every == 0:
            unseen_loss = evaluate()
            trace.log(step, unseen_loss=unseen_loss)
            best = min(unseen_loss, best)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        x, y = draw(training, batch_size, context)
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        trace.log(step, loss=loss)
        trace.step(step + 1, batch=[x], loss=loss, model=model, optimizer=optimizer)

    final = evaluate()
    start = torch.tensor([[number["\n"]]])
    written = "".join(vocabulary[index] for index in model.write(start, 300)[0].tolist())
    return {"loss": final, "best": min(final, best), "text": written}


if __name__ == "__main__":
    traces.main(train)
