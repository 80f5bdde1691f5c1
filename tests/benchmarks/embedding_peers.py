"""The peers of embedding_speed.py, each in a process of its own: python embedding_peers.py WAY SPEC.JSON

Runs in the peer's interpreter, so it imports nothing of clipdist. WAY: `clip-retrieval`, its own `clip-retrieval
inference`, of which only the times of its batches are noted; or `loop`, a DataLoader and a forward pass. Both leave a
line of JSON per batch (begin, end: seconds since 1970; rows) in the spec's `lines`, and the device in `facts`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch

NAME = "benchmarked"


def clip_retrieval(spec: dict[str, Any]) -> None:
    """Its command line with its defaults but workers and batch. The weights come as a file: all_clip takes
    `open_clip:NAME/FILE`; the JSON config makes the name known."""
    from clip_retrieval.cli import main  # type: ignore[import-not-found]
    from clip_retrieval.clip_inference.logger import LoggerWriter  # type: ignore[import-not-found]

    original = LoggerWriter.__call__

    def noted(self: Any, stats: dict[str, Any]) -> None:
        line = {"begin": stats["start_time"], "end": stats["end_time"], "rows": stats["sample_count"]}
        with open(spec["lines"], "a") as file:
            print(json.dumps(line), file=file)
        original(self, stats)

    LoggerWriter.__call__ = noted
    options = {
        "input_dataset": spec["folder"], "output_folder": spec["output"],
        "clip_model": f"open_clip:{NAME}/{spec['weights']}", "num_prepro_workers": spec["workers"],
        "batch_size": spec["batch"],
    }  # fmt: skip
    sys.argv = ["clip-retrieval", "inference", *(f"--{name}={value}" for name, value in options.items())]
    main()


class Photos(torch.utils.data.Dataset[torch.Tensor]):
    """The pictures of a folder, in the order of their names."""

    def __init__(self, folder: str, transform: Any) -> None:
        self.paths, self.transform = sorted(Path(folder).iterdir()), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            found: torch.Tensor = self.transform(image)
        return found


def loop(spec: dict[str, Any]) -> None:
    """What one writes by hand: open_clip's evaluation transform in the DataLoader's workers, fp32 (bf16 autocast on a
    GPU), unit vectors as float16 in one file."""
    import numpy as np

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model, _, transform = open_clip.create_model_and_transforms(NAME, pretrained=spec["weights"], device=device)
    model.eval()
    photos = Photos(spec["folder"], transform)
    batches = torch.utils.data.DataLoader(photos, spec["batch"], num_workers=spec["workers"], pin_memory=gpu)
    vectors, begin = [], time.time()
    with (
        open(spec["lines"], "a", buffering=1) as file,
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=gpu),
    ):
        for batch in batches:
            found = model.encode_image(batch.to(device, non_blocking=True)).float()
            vectors.append(torch.nn.functional.normalize(found, dim=-1).half().cpu().numpy())
            end = time.time()
            print(json.dumps({"begin": begin, "end": end, "rows": len(batch)}), file=file)
            begin = end
    Path(spec["output"]).mkdir(parents=True)
    np.save(Path(spec["output"]) / "vectors.npy", np.concatenate(vectors))


if __name__ == "__main__":
    chosen = json.loads(Path(sys.argv[2]).read_text())
    open_clip.add_model_config(chosen["config"])
    facts = {"device": "cuda" if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
    Path(chosen["facts"]).write_text(json.dumps(facts))
    {"clip-retrieval": clip_retrieval, "loop": loop}[sys.argv[1]](chosen)
