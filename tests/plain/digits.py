"""The training of examples/digits.py as a plain PyTorch program, with its own copy of everything."""

import random

import numpy as np
import torch
import traces
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional


class Digits(torch.utils.data.Dataset):
    def __init__(self, train, most=None):
        digits = load_digits()
        mine = np.flatnonzero((np.arange(len(digits.target)) % 5 != 0) == train)[:most]
        self.images = torch.tensor(digits.images[mine] / 16, dtype=torch.float32)[:, None]
        self.labels = torch.tensor(digits.target[mine])
        self.train = train

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        return augment(image) if self.train else image, self.labels[index]


def augment(image):
    angle = torch.randn(()) * 0.2
    cos, sin = angle.cos(), angle.sin()
    right, down = random.uniform(-0.15, 0.15), random.uniform(-0.15, 0.15)
    place = torch.tensor([[[cos, -sin, right], [sin, cos, down]]])
    grid = functional.affine_grid(place, [1, *image.shape], align_corners=False)
    image = functional.grid_sample(image[None], grid, align_corners=False)[0]
    return image + torch.from_numpy(np.random.normal(0, 0.1, image.shape)).float()


def build():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def evaluate(model, dataset):
    model.eval()
    with torch.no_grad():
        found = model(dataset.images).argmax(1)
    model.train()
    return (found == dataset.labels).float().mean().item()


def train(trace, lr=1e-2, epochs=40, workers=2, batch_size=64, images=None):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, test = build(), Digits(train=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = torch.utils.data.DataLoader(
        Digits(train=True, most=images), batch_size=batch_size, shuffle=True, num_workers=workers
    )
    step, best = 0, 0.0
    for _ in range(epochs):
        for x, y in loader:
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            trace.log(step, loss=loss)
            trace.step(step, batch=[x], loss=loss, model=model, optimizer=optimizer)
        scheduler.step()
        accuracy = evaluate(model, test)
        trace.log(step, accuracy=accuracy)
        best = max(accuracy, best)
    return {"accuracy": evaluate(model, test), "best": best}


if __name__ == "__main__":
    traces.main(train)
