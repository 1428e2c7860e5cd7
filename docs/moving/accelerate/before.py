import torch
from accelerate import Accelerator
from accelerate.utils import set_seed


class Noisy(torch.utils.data.Dataset):
    """Points on a plane, seen through noise that is drawn in the loader."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x = torch.randn(3)
        return x, x.sum(0, keepdim=True) + index / 60


def train(epochs=3):
    accelerator = Accelerator()
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(epochs):
        for x, y in loader:
            loss = torch.nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state("state")
    return {"loss": loss.item()}


if __name__ == "__main__":
    set_seed(0)
    print(train())
