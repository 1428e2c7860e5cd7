"""Train a small CNN on scikit-learn's handwritten digits, in a chain of jobs that equals one long job.

It has what makes real trainings hard to resume exactly: a shuffled loader whose workers augment the images
with three libraries' random numbers, dropout, momentum, a learning rate schedule, an evaluation per epoch::

    chainrun run examples/digits.yaml --walltime 8s            # on this machine, cut every 8 seconds
    chainrun submit examples/digits.yaml slurm.time=2min       # the same chain on SLURM

Needs scikit-learn (``pip install chainrun[examples]``); the images come with it.
"""

import random

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

import chainrun


class Digits(torch.utils.data.Dataset):
    """1797 images of 8 x 8 pixels, every fifth of them for testing; training images differ on every visit."""

    def __init__(self, train: bool, most: int | None = None) -> None:
        digits = load_digits()
        mine = np.flatnonzero((np.arange(len(digits.target)) % 5 != 0) == train)[:most]
        self.images = torch.tensor(digits.images[mine] / 16, dtype=torch.float32)[:, None]
        self.labels = torch.tensor(digits.target[mine])
        self.train = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        return augment(image) if self.train else image, self.labels[index]


def augment(image: torch.Tensor) -> torch.Tensor:
    """Turn (torch), shift (random) and add noise (NumPy): drawn in the loader's worker, as usual."""
    angle = torch.randn(()) * 0.2
    cos, sin = angle.cos(), angle.sin()
    right, down = random.uniform(-0.15, 0.15), random.uniform(-0.15, 0.15)
    place = torch.tensor([[[cos, -sin, right], [sin, cos, down]]])
    grid = functional.affine_grid(place, [1, *image.shape], align_corners=False)
    image = functional.grid_sample(image[None], grid, align_corners=False)[0]
    return image + torch.from_numpy(np.random.normal(0, 0.1, image.shape)).float()


class Net(torch.nn.Sequential):
    """Two convolutions and two linear layers, with dropout."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(1, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, padding=1),
            torch.nn.BatchNorm2d(64),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(64 * 4 * 4, 128),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(128, 10),
        )


def evaluate(model: torch.nn.Module, dataset: Digits, device: torch.device) -> float:
    """Return the share of images that the model reads correctly."""
    model.eval()
    with torch.no_grad():
        found = model(dataset.images.to(device)).argmax(1).cpu()
    model.train()
    return (found == dataset.labels).float().mean().item()


def train(
    run: chainrun.Run,
    lr: float = 1e-2,
    epochs: int = 40,
    workers: int = 2,
    batch_size: int = 64,
    images: int | None = None,
) -> dict[str, float]:
    """Train; return the accuracy on the test images."""
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, the workers do
    model, test = Net().to(run.device), Digits(train=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = chainrun.DataLoader(
        Digits(train=True, most=images), batch_size=batch_size, shuffle=True, num_workers=workers
    )

    run.register(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    for _ in run.epochs(epochs):
        for x, y in loader:
            logits = model(x.to(run.device))
            loss = functional.cross_entropy(logits, y.to(run.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
        scheduler.step()
        accuracy = evaluate(model, test, run.device)
        run.log(accuracy=accuracy)
        run.state["best"] = max(accuracy, run.state.get("best", 0.0))
    return {"accuracy": evaluate(model, test, run.device), "best": run.state["best"]}
