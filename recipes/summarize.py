"""Collect the runs of a sweep in one table: ``python -m recipes.summarize outputs/train/… results.csv``.

Reads every ``summary.json`` below the folder and prints means and standard errors over seeds as a Markdown table.
Writes the CSV file, with one row per run. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from recipes.reporting.tables import baseline_first, markdown_table, with_error
from recipes.runtime.help import plain
from recipes.runtime.mistakes import end

GROUP = ["data", "model", "penalty", "penalty_weight"]
SHOWN = {
    "test_accuracy": "accuracy",
    "lambda_max_mean": "λ mean",
    "lambda_max_median": "λ median",
    "lambda_max_p95": "λ 95 %",
    "log10_bound": "log₁₀ bound",
    "total_seconds": "seconds",
}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=plain(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder")
    parser.add_argument("output", type=Path, help="the CSV file to write")
    arguments = parser.parse_args()
    try:
        runs = read_runs(arguments.folder)
    except FileNotFoundError as error:
        end(str(error))
    runs.to_csv(arguments.output, index=False, float_format="%.6g")
    print(as_markdown(runs))


def read_runs(folder: Path) -> pd.DataFrame:
    """Return one row per run.

    Raises:
        FileNotFoundError: If there is no finished run.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.rglob("summary.json"))]
    finished = [run for run in found if run.get("status", "finished") == "finished"]
    if not finished:
        raise FileNotFoundError(
            f"There is no summary.json of a finished run below {folder.resolve()}: has a run finished there?"
        )
    runs = pd.DataFrame(finished).drop(columns=["provenance", "status"], errors="ignore")
    return baseline_first(runs, "none", [*GROUP, "seed"], "penalty")


def as_markdown(runs: pd.DataFrame) -> str:
    """Return means and standard errors over the seeds of each setting as a table."""
    groups = runs.groupby(GROUP, sort=False)
    mean, error, count = groups[list(SHOWN)].mean(), groups[list(SHOWN)].sem(), groups.size()
    table = pd.DataFrame({"seeds": count.astype(str)})
    for name, title in SHOWN.items():
        table[title] = [with_error(*pair) for pair in zip(mean[name], error[name], strict=True)]
    return markdown_table(table.reset_index().astype({name: str for name in GROUP}))


if __name__ == "__main__":
    main()
