"""`chainrun report`: one HTML page, and a picture, of a run or of a folder of runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from chainrun import yamlfile
from chainrun.errors import EXIT_DONE, UsageError
from chainrun.launch import slurm
from chainrun.report import curves, figure, overview, page, plots, reading, timeline
from chainrun.report.story import Event
from chainrun.rundir import RunDir, open_run, write_durably

KINDS = (".html", ".png")


def command(path: Path, output: Path | None) -> int:
    """Write the report of a run, or of all runs in a folder; print where it is.

    Args:
        output: the page's file, a picture of the same name goes beside it; or a .png, then only that. By default
            ``report.html`` in the run, or in the folder.

    Raises:
        UsageError: there is no run; matplotlib is missing; the file cannot be written.
    """
    figure.library()  # before anything is read
    if output is not None and output.suffix.lower() not in KINDS:
        raise UsageError(f"-o {output}: give the name of a .html or a .png file")
    runs = [open_run(path)] if (path / "experiment.yaml").is_file() else _in_folder(path)
    single = RunDir(path.absolute()).experiment.is_file()
    target = (output or RunDir(path).report).absolute()
    waiting = slurm.states([j for r in runs if not r.done.exists() for j in reading.jobs(_journal(r))])
    made = _of_run(runs[0], waiting) if single else _of_folder(path.absolute(), runs, waiting, target)
    html, drawing = made
    picture = target.with_suffix(".png")
    try:
        if target.suffix.lower() == ".html":
            write_durably(target, html.encode())
            print(target)
        drawing.png(picture)
        print(picture)
    except OSError as error:
        raise UsageError(
            f"the report could not be written: {error}; choose another file with -o FILE"
        ) from error
    return EXIT_DONE


def _journal(run: RunDir) -> list[Event]:
    from chainrun import journal

    return list(journal.events(run))


def _in_folder(path: Path) -> list[RunDir]:
    """Return the runs in a folder, and in folders in it: a group of a sweep among others."""
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; give a run directory, or a folder that holds some")
    found = sorted({*path.glob("*/experiment.yaml"), *path.glob("*/*/experiment.yaml")})
    if not found:
        raise UsageError(f"there is no run in {path}; give a run directory, or a folder that holds some")
    return [open_run(each.parent) for each in found]


def _text(run: RunDir) -> str:
    try:
        return run.experiment.read_text(errors="replace")
    except OSError:
        return ""


def _of_run(run: RunDir, waiting: dict[str, tuple[str, str]]) -> tuple[str, figure.Drawing]:
    told, metrics = reading.tell(run, waiting), curves.read(run)
    parts: list[tuple[float, Any, tuple[Any, ...]]] = []
    when = drawn = ""
    if told.segments:
        height = timeline.height(told)
        parts.append((height, timeline.draw, (told,)))
        when = figure.Drawing(height).draw(timeline.draw, told).svg("timeline")
    height = plots.height(metrics)
    if height:
        parts.append((height, plots.draw, (metrics, told)))
        drawn = figure.Drawing(height).draw(plots.draw, metrics, told).svg("metrics")
    parts.insert(0, (0.7, timeline.title, (told,)))
    whole = figure.Drawing(sum(height for height, _, _ in parts)).stack(parts)
    return page.run_page(told, metrics, when, drawn, _text(run)), whole


def _of_folder(
    folder: Path, runs: list[RunDir], waiting: dict[str, tuple[str, str]], target: Path
) -> tuple[str, figure.Drawing]:
    stories = [reading.tell(run, waiting) for run in runs]
    found = [curves.read(run) for run in runs]
    names = overview.names_of(found)
    drawing = figure.Drawing(plots.overview_height(stories, names))
    drawing.draw(plots.overview, stories, found, names)
    differing = _differing(runs)
    html = overview.overview_page(
        folder, stories, found, differing, drawing.svg("overview"), target, time.time()
    )
    return html, drawing


def _differing(runs: list[RunDir]) -> list[dict[str, Any]]:
    """Return of each run the experiment's keys whose values are not the same in all of them."""
    flat = [_flat(run) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    shown = [
        key
        for key in sorted(keys, key=lambda key: not key.startswith("args."))
        if key not in ("name", "dir", "function") and len({repr(each.get(key)) for each in flat}) > 1
    ]
    return [{key: each.get(key) for key in shown[:6]} for each in flat]


def _flat(run: RunDir) -> dict[str, Any]:
    try:
        data, _ = yamlfile.load(run.experiment)
    except Exception:  # a damaged one: its run is shown all the same
        return {}
    found: dict[str, Any] = {}

    def walk(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{key}.{name}" if key else str(name), inner)
        else:
            found[key] = value

    walk("", data)
    return found
