"""The training of examples/article.py as a plain PyTorch program, with its own copy of everything."""

import random

import numpy as np
import torch
import traces


class Draws(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, torch.tensor([random.random(), np.random.rand(), torch.rand(())])


def train(trace, epochs=2, size=48, workers=4):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(Draws(size), batch_size=4, shuffle=True, num_workers=workers)
    step = 0
    for _ in range(epochs):
        for indices, numbers in loader:
            loss = torch.nn.functional.mse_loss(model(numbers), indices[:, None] / size)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            trace.log(step, loss=loss, indices=indices, numbers=numbers)
            trace.step(step, batch=[numbers], loss=loss, model=model, optimizer=optimizer)
    return model.weight[0].tolist()


if __name__ == "__main__":
    traces.main(train)
