import random

import numpy as np
import torch


class Noisy(torch.utils.data.Dataset):
    """Points on a plane, seen through noise that is drawn in the loader."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x = torch.tensor([index / 60, random.random(), np.random.rand()], dtype=torch.float32)
        return x, x.sum(0, keepdim=True) + 0.1 * torch.randn(1)


def train(epochs=3):
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2)

    best = float("inf")
    for epoch in range(epochs):
        for x, y in loader:
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            best = min(best, loss.item())
        scheduler.step()
    return {"loss": loss.item(), "best": best}


if __name__ == "__main__":
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    print(train())
