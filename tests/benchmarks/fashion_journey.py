"""The whole journey on 8,499 shop photos, timed: python tests/benchmarks/fashion_journey.py PRODUCTS.CSV FOLDER

PRODUCTS.CSV has the columns id, image, title, ... with the pictures beside it. The last line is JSON: seconds per step,
hit rates of the held-out titles (a hit is any row of the same title).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from clipdist import embed, evaluate, prepare, starter, train
from clipdist.cli import load_job

STAGES = [
    {"name": "projections", "learns": ["projections", "logit_scale"], "epochs": 5, "learning_rate": 3e-4},
    {"name": "all", "learns": ["all"], "epochs": 2, "learning_rate": 3e-4, "learning_rates": {"text_tower": 5e-5}},
]


def main(table: str, folder: str) -> None:
    home, seconds = Path(folder).absolute(), {}

    def step(job: str, module: Any, **values: Any) -> Any:
        started = time.monotonic()
        given = {"output": str(home / job), **values}
        result = module.run(load_job(job, None, [f"{key}={json.dumps(value)}" for key, value in given.items()]).config)
        seconds[job] = round(time.monotonic() - started, 1)
        return result

    columns = {"group": "title", "keep": ["article_type", "colour", "gender", "season"]}
    step("prepare", prepare, source={"path": table}, captions=["{title}"], columns=columns)
    started = time.monotonic()
    starter.make_from_pairs(str(home / "prepare"), str(home / "starter"), image_size=128)
    seconds["starter"] = round(time.monotonic() - started, 1)
    pairs, model = str(home / "prepare"), {"name": str(home / "starter")}
    step("train", train, pairs=pairs, model=model, stages=STAGES, global_batch_size=128, workers={"num_workers": 2})
    step("embed", embed, pairs=pairs, model={"name": str(home / "train")})
    result = step("evaluate", evaluate, embeddings=str(home / "embed"), split="validation")
    print(evaluate.summary(result))
    metrics = {name: result["metrics"][f"text_to_image/{name}"] for name in ("hit_rate@1", "hit_rate@5", "hit_rate@10")}
    print(json.dumps({"seconds": seconds, "total_seconds": round(sum(seconds.values()), 1), **metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
