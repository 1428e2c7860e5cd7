"""MLflow over a chain: one run, found again by `run.id`, in which no step is there twice.

MLflow chooses its run ids itself, so ours is kept as a tag. It never overwrites what was logged: after a crash the
steps since the last checkpoint come again, with the same values, and are not logged a second time::

    MLFLOW_TRACKING_URI=sqlite:///mlflow.db chainrun run examples/trackers/with_mlflow.yaml --interrupt-at 12
"""

import contextlib

import mlflow
import torch

import chainrun


def open_run(run: chainrun.Run) -> tuple[mlflow.ActiveRun, int]:
    """Return the MLflow run of this chain and the last step that it has."""
    found = mlflow.search_runs(filter_string=f"tags.chainrun = '{run.id}'", output_format="list")
    if not found:
        return mlflow.start_run(run_name=run.id, tags={"chainrun": run.id}), 0
    run_id = found[0].info.run_id
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    return mlflow.start_run(run_id), max((metric.step for metric in history), default=0)


def train(run: chainrun.Run, steps: int = 30) -> float:
    """Fit a line; return the last loss."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.register(model=model, optimizer=optimizer)
    tracked, logged = open_run(run) if run.is_main else (contextlib.nullcontext(), 0)
    with tracked:
        for _ in run.steps(steps):
            x = torch.randn(16, 4)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
            if run.is_main and run.global_step > logged:
                mlflow.log_metric("loss", loss.item(), step=run.global_step)
    return loss.item()
