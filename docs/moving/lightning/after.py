import lightning
import torch

import chainrun


class Noisy(torch.utils.data.Dataset):
    """Points on a plane, seen through noise that is drawn in the loader."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x = torch.randn(3)
        return x, x.sum(0, keepdim=True) + index / 60


class Fit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))

    def training_step(self, batch, index):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def train(run, epochs=3):
    module = Fit().to(run.device)
    logged = {}
    module.log = lambda name, value, **options: logged.update({name: value})
    loader = chainrun.DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2)
    (optimizer,), (scheduler,) = module.configure_optimizers()

    run.register(module=module, optimizer=optimizer, scheduler=scheduler, loader=loader)
    for _ in run.epochs(epochs):
        for batch in loader:
            index = run.global_step % len(loader)
            loss = module.training_step([x.to(run.device) for x in batch], index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(**logged)
        scheduler.step()
    return {"loss": loss.item()}
