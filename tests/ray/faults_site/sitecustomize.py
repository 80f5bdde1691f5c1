"""Faults inside the processes of a job, put in from outside: with this folder on PYTHONPATH, modules are
changed as soon as they are imported. The file that EMBED_FAULTS names says what is to happen now:

    {"decode": "dies"}    a process dies when it decodes a picture whose file holds KILLS_DECODER
    {"encode": "marked"}  ... when it encodes a picture that is of the colour MARKED all over
    {"encode": "always"}, {"load": "always"}   ... when it encodes anything; when it loads the model
    {"slow": 0.2}         seconds that each unit takes longer
    {"disk": "full"}      a file that holds embeddings cannot be written
    {"public": "127.0.0.1"}   an address that counts as one of the internet

What processes do stands in its neighbour `....log`, a line each: what, rows, process, parent process (a raylet).
"""

import errno
import importlib.abc
import importlib.util
import json
import os
import sys
import time

KILLS_DECODER = b"kills-the-decoder"
MARKED = (13, 77, 201)


def _now():
    try:
        with open(os.environ["EMBED_FAULTS"]) as file:
            return json.load(file)
    except (OSError, ValueError, KeyError):
        return {}


def _tell(what, rows):
    with open(os.environ["EMBED_FAULTS"] + ".log", "a") as file:
        file.write(f"{what} {rows} {os.getpid()} {os.getppid()}\n")


def _change_storage(storage):
    real = storage._write_temporary

    def write(inner, data):
        if _now().get("disk") == "full" and "/pieces/" in inner:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), inner)
        return real(inner, data)

    storage._write_temporary = write


def _change_fetch(fetch):
    real = fetch.is_public
    fetch.is_public = lambda text: text == _now().get("public") or real(text)


def _change_loading(module):
    real_load, real_decode = module.load_rows, module.images.decode

    def load_rows(rows, *args, **kwargs):
        _tell("load", len(rows))
        time.sleep(_now().get("slow", 0))
        return real_load(rows, *args, **kwargs)

    def decode(data, **kwargs):
        if _now().get("decode") == "dies" and KILLS_DECODER in data:
            os._exit(9)
        return real_decode(data, **kwargs)

    module.load_rows, module.images.decode = load_rows, decode


def _change_encoding(module):
    real_images, real_init = module.Encoder.images, module.Encoder.__init__

    def init(self, *args, **kwargs):
        if _now().get("load") == "always":
            _tell("init", 0)
            os._exit(9)
        real_init(self, *args, **kwargs)

    def images(self, pixels):
        if len(pixels):
            _tell("encode", len(pixels))
            dies, marked = _now().get("encode"), (pixels == MARKED).all(axis=(1, 2, 3)).any()
            if dies == "always" or (dies == "marked" and marked):
                os._exit(9)
            time.sleep(_now().get("slow", 0))
        return real_images(self, pixels)

    module.Encoder.__init__, module.Encoder.images = init, images


CHANGES = {
    "clipdist.loading": _change_loading,
    "clipdist.encoding": _change_encoding,
    "clipdist.storage": _change_storage,
    "clipdist.fetch": _change_fetch,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


if "EMBED_FAULTS" in os.environ:
    sys.modules["transformers"] = None  # open_clip does without; importing it is a good part of a worker's start
    sys.meta_path.insert(0, _Finder())
