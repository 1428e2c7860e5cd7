import os
import random
import sys

import torch


def train(epochs=3):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = [torch.tensor([i / 24, (i % 5) / 5, 1.0]) for i in range(24)]
    start = 0
    if os.path.exists("last.pt"):
        last = torch.load("last.pt")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        start = last["epoch"] + 1

    for epoch in range(start, epochs):
        random.shuffle(data)
        for x in data:
            x = x + 0.1 * torch.randn(3)
            loss = (model(x) - x.sum()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt"
        )
        if os.path.exists("stop"):
            os.remove("stop")
            sys.exit(0)
    return {"loss": loss.item()}


if __name__ == "__main__":
    random.seed(0)
    torch.manual_seed(0)
    print(train())
