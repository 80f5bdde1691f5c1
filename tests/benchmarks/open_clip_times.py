"""Runs `open_clip_train` as it is installed and writes down when it logged what:

python open_clip_times.py THREADS LINES.jsonl [options of open_clip_train]

Its own log has whole seconds only. A line is {"time": seconds since 1970, "message": what it logged}.
"""

import json
import logging
import sys

import torch


class Lines(logging.Handler):
    """Every record of the root logger as one JSON line."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        with open(self.path, "a") as file:
            print(json.dumps({"time": record.created, "message": record.getMessage()}), file=file)


if __name__ == "__main__":
    from open_clip_train.main import main

    threads, lines, *options = sys.argv[1:]
    torch.set_num_threads(int(threads))
    logging.root.addHandler(Lines(lines))
    main(options)
    logging.info("End of main")
