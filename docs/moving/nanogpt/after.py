import pathlib
import random

import torch

max_iters, eval_interval, eval_iters = 12, 4, 2
batch_size, block_size, learning_rate = 4, 8, 1e-2

text = pathlib.Path(random.__file__).read_text()  # some text that is there everywhere
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])


def get_batch():
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in ix])
    return x, y


def loss_on_a_batch(model):
    x, y = get_batch()
    return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def estimate_loss(model):
    model.eval()
    loss = sum(loss_on_a_batch(model).item() for _ in range(eval_iters)) / eval_iters
    model.train()
    return loss


def train(run):
    model = torch.nn.Sequential(
        torch.nn.Embedding(len(characters), 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, len(characters))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    run.register(model=model, optimizer=optimizer)
    run.state.setdefault("best_val_loss", 1e9)

    for iter_num in run.steps(max_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - iter_num / max_iters)
        if iter_num % eval_interval == 0:
            val_loss = estimate_loss(model)
            if val_loss < run.state["best_val_loss"]:
                run.state["best_val_loss"] = val_loss
                torch.save(model.state_dict(), run.dir / "best.pt")
        loss = loss_on_a_batch(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    return {"loss": loss.item(), "best": run.state["best_val_loss"]}
