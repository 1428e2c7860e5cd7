import random

import torch


def train(run, epochs=3):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = [torch.tensor([i / 24, (i % 5) / 5, 1.0]) for i in range(24)]
    run.register(model=model, optimizer=optimizer)
    order = run.state.setdefault("order", list(range(24)))

    for _ in run.epochs(epochs):
        random.shuffle(order)
        for number in run.steps(len(order)):
            x = data[order[number]] + 0.1 * torch.randn(3)
            loss = (model(x) - x.sum()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    return {"loss": loss.item()}
