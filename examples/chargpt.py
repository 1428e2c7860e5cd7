"""A character-level GPT that learns to write Python from the standard library's own source, in nanoGPT's style.

No epochs and no loader: batches are drawn with `torch.randint` from the global generator, the learning rate is
worked out from the step, and every so many steps the loss on unseen text is estimated::

    chainrun run examples/chargpt.yaml --walltime 8s           # on this machine, cut every 8 seconds
    chainrun submit examples/chargpt.yaml slurm.time=2min      # the same chain on SLURM

At the end it prints what it would write: `chainrun logs runs/chargpt`.
"""

import math
import sysconfig
from pathlib import Path

import torch
from torch.nn import functional

import chainrun


def read_text(size: int) -> str:
    """Return the first `size` characters of the standard library's top-level modules, in order of their names."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8")
        if len(text) >= size:
            break
    return text[:size]


class Block(torch.nn.Module):
    """Attention to the past, then a perceptron; each adds to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width),
            torch.nn.GELU(),
            torch.nn.Linear(4 * width, width),
            torch.nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))


class GPT(torch.nn.Module):
    """Gives the logits of the next character at every place."""

    def __init__(
        self, vocabulary: int, context: int, layers: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.context = context
        self.characters = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Embedding(context, width)
        self.blocks = torch.nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.characters.weight  # tied: one tensor under two names
        for weight in self.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.characters(x) + self.places(places))))

    @torch.no_grad()
    def write(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """Return x with `length` more characters, drawn one after another."""
        self.eval()
        for _ in range(length):
            chances = self(x[:, -self.context :])[:, -1].softmax(-1)
            x = torch.cat([x, torch.multinomial(chances, 1)], dim=1)
        return x


def draw(text: torch.Tensor, batch_size: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pieces of the text from random places, and the same pieces one character further."""
    starts = torch.randint(len(text) - context, (batch_size,)).tolist()
    x = torch.stack([text[start : start + context] for start in starts])
    y = torch.stack([text[start + 1 : start + 1 + context] for start in starts])
    return x, y


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up, then half a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    run: chainrun.Run,
    steps: int = 400,
    lr: float = 2e-3,
    batch_size: int = 16,
    context: int = 64,
    layers: int = 3,
    heads: int = 4,
    width: int = 96,
    dropout: float = 0.1,
    characters: int = 1_000_000,
    evaluate_every: int = 100,
    evaluate_batches: int = 10,
) -> dict[str, float | str]:
    """Train; return the loss on unseen text, in nats a character, and what the model writes."""
    torch.set_num_threads(1)  # a model this small gains little from a second thread
    text = read_text(characters)
    vocabulary = sorted(set(text))
    number = {character: index for index, character in enumerate(vocabulary)}
    data = torch.tensor([number[character] for character in text], device=run.device)
    training, unseen = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    model = GPT(len(vocabulary), context, layers, heads, width, dropout).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)

    def loss_on(text: torch.Tensor) -> torch.Tensor:
        x, y = draw(text, batch_size, context)
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        loss = sum(loss_on(unseen).item() for _ in range(evaluate_batches)) / evaluate_batches
        model.train()
        return loss

    run.register(model=model, optimizer=optimizer)
    for step in run.steps(steps):
        if step % evaluate_every == 0:
            unseen_loss = evaluate()
            run.log(unseen_loss=unseen_loss)
            run.state["best"] = min(unseen_loss, run.state.get("best", math.inf))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        loss = loss_on(training)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log(loss=loss)

    final = evaluate()
    start = torch.tensor([[number["\n"]]], device=run.device)
    written = "".join(vocabulary[index] for index in model.write(start, 300)[0].tolist())
    print(written)
    return {"loss": final, "best": min(final, run.state["best"]), "text": written}
