"""`clipdist <job>`: configs, overrides, --explain, --dry-run; what people see, and exit codes.

Exit codes: 0 done, 1 a fault of the program or the cluster, 2 a mistake in what was asked for, 130 interrupted.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # or workers start through `uv run` again

import argparse
import importlib
import json
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from clipdist import __version__
from clipdist.config import Fault, Loaded, Section, UserError, explain, load

JOBS = {
    "prepare": ("PrepareConfig", "raw tables, folders or tars -> validated pairs"),
    "train": ("TrainConfig", "pairs + a CLIP -> a CLIP of your domain"),
    "embed": ("EmbedConfig", "catalog or pairs -> image and text embeddings"),
    "evaluate": ("EvaluateConfig", "embeddings -> metrics, heatmap, report"),
    "search": ("SearchConfig", "text or a picture -> hits"),
    "mine": ("MineConfig", "many query vectors -> the hits of each, over a cluster"),
}
MODULES = {"search": "clipdist.find"}

EXAMPLES = """examples:
  clipdist demo                                        the whole journey in a few minutes, nothing to prepare
  clipdist prepare jobs/prepare.yaml --dry-run         look at the input before hours of work
  clipdist train jobs/train.yaml workers.num_workers=8 any value can be given as key=value
  clipdist embed jobs/embed.yaml --explain             every value, where it comes from, what it means
  clipdist search runs/embeddings --text "red summer dress" --html hits.html
  clipdist info runs/pairs                             what any folder of clipdist is
  clipdist remove runs/embeddings ids.txt              take rows out; `clipdist compact` frees their space
  clipdist vocab runs/pairs                            words of your captions that may deserve a token of their own
"""


SEARCH_EXAMPLES = """a QUERY is terms joined by + and -, each a word of its own, with a weight before it where it is not
1. The path or URL of a picture is that picture, id:ID a catalog row, all else text.

examples:
  clipdist search runs/embeddings "red summer dress"
  clipdist search runs/embeddings "red dress" + ./pool.jpg - 0.5:floral
  clipdist search runs/embeddings id:15970 --collapse 0.98         more like this one, without near-duplicates
  clipdist search runs/embeddings --image shoe.jpg --for texts
  clipdist search runs/embeddings --text dress --text shoes        several queries; each text as it is
  clipdist search runs/embeddings dress --where "colour = 'red' and price < 50" --min-score 0.2
  clipdist search runs/embeddings "pink backpack" --top 20 --html hits.html --open
  clipdist search runs/embeddings --id 15970 --format paths | xargs -d '\\n' cp -t like-15970
  clipdist search runs/embeddings --interactive --preview
  clipdist search jobs/search.yaml top=5
"""

SETTING = re.compile(r"[a-z_][\w.]*=")
"""A word of a search that is a setting, and no part of the query."""

WRONG_PATH = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
"""Errors of the operating system that are a person's mistake; others, such as a full disk, are a fault."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _options(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves as on Ctrl-C
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        several = f"{len(error.problems)} problems:\n  " if len(error.problems) > 1 else ""
        print(f"clipdist {options.command}: {several}" + "\n  ".join(error.problems), file=sys.stderr)
        return 1 if isinstance(error, Fault) else 2
    except KeyboardInterrupt:
        print(
            f"\nclipdist {options.command}: interrupted. What is finished stays; run the same command again to go on.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None and not _is_about_storage(error):
            raise
        print(f"clipdist {options.command}: {mistake or f'{type(error).__name__}: {error}'}", file=sys.stderr)
        fault = isinstance(error, OSError) and not isinstance(error, WRONG_PATH)
        return 1 if isinstance(mistake, Fault) or (mistake is None and fault) else 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; `key=value` may also stand behind options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    search = options.command == "search"  # whose query may go on behind options
    wrong = [word for word in rest if (word.startswith("-") and word != "-") or ("=" not in word and not search)]
    if wrong or (rest and options.command not in JOBS):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _is_about_storage(error: Exception) -> bool:
    """A path that cannot be read or written, missing credentials: the message says enough."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("botocore", "aiobotocore"))


def _mistake_behind(error: BaseException | None) -> UserError | None:
    """The person's mistake that a worker met, inside whatever Ray wrapped around it."""
    for _ in range(10):
        if error is None or isinstance(error, UserError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipdist",
        description="Turn a general CLIP into the image search of one domain.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipdist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, meaning) in JOBS.items():
        command = commands.add_parser(
            name,
            help=meaning,
            description=meaning[0].upper() + meaning[1:] + ".",
            epilog=_job_epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _job_arguments(command, name)
        command.set_defaults(run=_run_search if name == "search" else _run_job)
    info = commands.add_parser("info", help="what a folder of clipdist is: stamp, rows, rejects, size")
    info.add_argument("path")
    info.add_argument("--format", choices=("table", "json"), default="table")
    info.set_defaults(run=_run_info)
    _upkeep_commands(commands)
    _cache_command(commands.add_parser("cache", help="what searches keep on this machine's disk"))
    _outside_commands(commands)
    _vocab_command(commands.add_parser("vocab", help="words of the captions that may deserve a token of their own"))
    demo = commands.add_parser("demo", help="the whole journey on emoji pictures (needs the extra `demo`)")
    demo.add_argument("folder", nargs="?", default="clipdist-demo", help="where everything goes (clipdist-demo)")
    demo.set_defaults(run=_run_demo)
    starter = commands.add_parser("starter", help="a small starter CLIP out of installable packages (extra `demo`)")
    starter.add_argument("pairs", help="pairs whose pictures fit the projection")
    starter.add_argument("output", help="folder of the model")
    starter.add_argument("--image-size", type=int, default=128, help="pixels per side (128)")
    starter.set_defaults(run=_run_starter)
    return parser


def _upkeep_commands(commands: Any) -> None:
    remove = commands.add_parser(
        "remove",
        help="take rows out of embeddings, by their ids",
        description=(
            "Takes rows out of both tables of finished embeddings. Nothing is rewritten: readers leave them out from\n"
            "now on; `clipdist compact` drops them for good. An id that stays in the catalog comes back with the next\n"
            "update that finds the catalog changed."
        ),
        epilog="examples:\n  clipdist remove runs/embeddings sold-out.txt\n"
        "  clipdist remove runs/embeddings --id 15970 --id 39386\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    remove.add_argument("output", help="folder of embeddings")
    remove.add_argument("ids", nargs="?", metavar="IDS.txt", help="a text file with one id per line")
    remove.add_argument("--id", action="append", default=[], dest="more_ids", help="an id; may be given several times")
    remove.set_defaults(run=_run_remove)
    compact = commands.add_parser(
        "compact",
        help="join small files of embeddings, and drop deleted rows for good",
        description=(
            "Joins the small files that updates leave into files of `shard_rows` rows, and drops deleted rows for\n"
            "good. A file that needs no joining is left as it is until 5 % of its rows are deleted. Vectors keep\n"
            "their bits. May be stopped at any time; the same command goes on. The files of before stay until the\n"
            "next change, for those who still read them."
        ),
        epilog="examples:\n  clipdist compact runs/embeddings\n"
        "  clipdist compact runs/embeddings --every   when deleted rows must go\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compact.add_argument("output", help="folder of embeddings")
    compact.add_argument("--every", action="store_true", help="also where fewer than 5 %% of a file's rows are deleted")
    compact.set_defaults(run=_run_compact)


def _cache_command(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Where this machine keeps what searches read from a store, and the codes of their first pass. With\n"
        "EMBEDDINGS, brings all of a store's embeddings there ahead of the first search; may be stopped and goes on\n"
        "where it was."
    )
    command.epilog = "examples:\n  clipdist cache\n  clipdist cache s3://bucket/embeddings\n  clipdist cache --clear\n"
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("embeddings", nargs="?", help="folder of embeddings on a store")
    command.add_argument("--clear", action="store_true", help="remove everything in it")
    command.set_defaults(run=_run_cache)


def _outside_commands(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write embeddings as NumPy matrices or flat faiss indexes",
        description=(
            "Writes both tables as matrices for numpy.load, or as exhaustive indexes for faiss.read_index, with a\n"
            "table of ids in the same order, into a new folder. Deleted rows are left out."
        ),
        epilog="examples:\n  clipdist export runs/embeddings runs/npy\n"
        "  clipdist export runs/embeddings runs/faiss --format faiss\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("embeddings", help="folder of embeddings")
    export.add_argument("output", help="a new folder")
    export.add_argument("--format", choices=("npy", "faiss"), default="npy", help="what to write (npy)")
    export.set_defaults(run=_run_export)
    approximate = commands.add_parser(
        "approximate",
        help="build an approximate index where the exact search is too slow (extra `faiss`)",
        description=(
            "Builds an IVF index of the pictures with faiss, tuned with real texts and pictures as queries, and tells\n"
            "recall and speed beside the exact search, per kind of query. The exact search needs none of this."
        ),
        epilog="examples:\n  clipdist approximate runs/embeddings runs/approximate --recall 0.95\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    approximate.add_argument("embeddings", help="folder of embeddings")
    approximate.add_argument("output", help="a new folder")
    approximate.add_argument("--recall", type=float, default=0.95, help="share of the best rows to be found (0.95)")
    approximate.add_argument("--top", type=int, default=10, help="how many best rows that is about (10)")
    approximate.add_argument(
        "--queries", type=int, default=2000, help="of each kind: half to tune, half to tell (2000)"
    )
    approximate.set_defaults(run=_run_approximate)


def _vocab_command(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Proposes domain terms: words that are frequent in the training captions and that the model's\n"
        "tokenizer breaks into many pieces, those first that save the most tokens (count x (pieces - 1)).\n"
        "Look through them before use."
    )
    command.epilog = (
        "examples:\n  clipdist vocab runs/pairs\n"
        "  clipdist vocab runs/pairs --model ViT-L-14 --top 200 --min-count 20 --out terms.txt\n"
        "  clipdist train jobs/train.yaml vocabulary.file=terms.txt\n"
    )
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("pairs", help="folder of pairs, made by `clipdist prepare`")
    command.add_argument("--model", default="ViT-B-32", metavar="NAME", help="whose tokenizer: a name as in model.name")
    command.add_argument("--top", type=int, default=50, help="words shown and written (50)")
    command.add_argument("--min-count", type=int, default=5, help="how often a word must stand in the captions (5)")
    command.add_argument("--out", metavar="FILE", help="also write a terms file, for vocabulary.file")
    command.set_defaults(run=_run_vocab)


def _job_epilog(name: str) -> str:
    if name == "search":
        return SEARCH_EXAMPLES
    return (
        f"examples:\n  clipdist {name} jobs/{name}.yaml\n"
        f"  clipdist {name} jobs/{name}.yaml output=runs/other --explain\n"
        f"  ray job submit --working-dir . -- python jobs/{name}.py jobs/{name}.yaml\n"
    )


def _job_arguments(command: argparse.ArgumentParser, name: str) -> None:
    what = "EMBEDDINGS folder, or a CONFIG.yaml" if name == "search" else "a CONFIG.yaml"
    command.add_argument("config", nargs="?", help=what)
    words = "QUERY ... key=value" if name == "search" else "key=value"
    command.add_argument("overrides", nargs="*", metavar=words, help="key=value: values that win over the file's")
    command.add_argument("--explain", action="store_true", help="print every value, its origin and meaning, and stop")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything on a few rows, write nothing, and stop"
    )
    if name == "search":
        _search_arguments(command)


def _search_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--text", action="append", default=[], help="a query text; may be given several times")
    add("--image", action="append", default=[], help="a query picture: a path or an http(s) URL")
    add("--id", action="append", default=[], help="a catalog row: what is like it, itself left out")
    add("--for", dest="find", choices=("images", "texts"), help="what to find (images)")
    add("--top", type=int, help="hits per query (10)")
    add("--offset", type=int, help="how many of the best hits to pass over (0)")
    add("--where", metavar="CONDITION", help="only rows that fit, such as \"colour = 'red' and price < 50\"")
    add("--min-score", type=float, help="no hits with a lower score")
    add("--collapse", type=float, metavar="COSINE", help="leave out near-duplicates of better hits, such as from 0.98")
    add("--model", help="the model, when it is no longer where the embeddings' stamp says")
    add("--device", help="cpu (the default), or cuda for a GPU")
    add("--format", choices=("table", "json", "paths"), help="how hits are printed (table)")
    add("--html", metavar="FILE", help="also write a gallery with pictures")
    add("--sheet", metavar="FILE.png", help="also write a contact sheet")
    add("--open", action="store_const", const=True, help="show the gallery in the browser")
    add("--preview", action="store_const", const=True, help="show the pictures in the terminal, where it can")
    add("--interactive", action="store_const", const=True, help="ask for queries; the model stays loaded")


def load_job(name: str, path: str | None, overrides: Sequence[str]) -> Loaded[Any]:
    """The config of a job, out of a file and overrides. UserError with all problems."""
    module = importlib.import_module(MODULES.get(name, f"clipdist.{name}"))
    kind: type[Section] = getattr(module, JOBS[name][0])
    return load(kind, path, overrides)


def _run_job(options: argparse.Namespace) -> int:
    path, overrides = options.config, list(options.overrides)
    if path is not None and "=" in path and not os.path.exists(path):
        path, overrides = None, [path, *overrides]
    if path is None and not overrides:
        raise UserError("give a CONFIG.yaml or key=value settings; --help shows examples")
    loaded = load_job(options.command, path, overrides)
    return _run_loaded(options, loaded)


def _run_loaded(options: argparse.Namespace, loaded: Loaded[Any]) -> int:
    module: Any = importlib.import_module(MODULES.get(options.command, f"clipdist.{options.command}"))
    if options.explain:
        print(explain(loaded, module.derived(loaded.config)))
    if options.dry_run:
        print(_facts([("dry run", "nothing was written"), *module.dry_run(loaded.config)]))
    if options.explain or options.dry_run:
        return 0
    result = module.run(loaded.config)
    _print_outcome(options.command, module, loaded.config, result)
    return 0


def _print_outcome(command: str, module: Any, config: Any, result: Any) -> None:
    from clipdist import storage
    from clipdist.info import rejects_table

    output = storage.absolute(config.output) if getattr(config, "output", None) else None
    if command in ("prepare", "embed", "mine"):
        print(_facts([*module.summary(result), ("output", output)]))
        if rejects := rejects_table(result):
            print("\nrejected:\n" + rejects)
    elif command == "train":
        print(module.summary(output, result))
    elif command == "evaluate":
        print(module.summary(result))
        print(f"report: {output}/report.html")


def _run_search(options: argparse.Namespace) -> int:
    path, words = options.config, list(options.overrides)
    if path is not None and "=" in path and not os.path.exists(path):
        path, words = None, [path, *words]
    overrides = [word for word in words if SETTING.match(word)]
    query = [word for word in words if not SETTING.match(word)]
    if path is not None and not path.endswith((".yaml", ".yml")):
        path, overrides = None, [f"embeddings={json.dumps(path)}", *overrides]
    flags = ("find", "top", "offset", "where", "min_score", "collapse", "device", "format", "html", "sheet", "model")
    given = {name: getattr(options, name) for name in (*flags, "open", "preview", "interactive")}
    given |= {"texts": options.text or None, "images": options.image or None, "ids": options.id or None}
    given |= {"queries": [" ".join(query)] if query else None}
    overrides += [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    return _run_loaded(options, load_job("search", path, overrides))


def _run_info(options: argparse.Namespace) -> int:
    from clipdist.info import describe, show

    found = describe(options.path)
    print(json.dumps(found, indent=1, default=str) if options.format == "json" else show(found))
    return 0


def _run_remove(options: argparse.Namespace) -> int:
    from clipdist import remove, storage

    ids = [*(remove.read_ids(options.ids) if options.ids else []), *options.more_ids]
    if not ids:
        raise UserError("give ids: a text file with one per line, or --id ID")
    print(remove.remove(storage.absolute(options.output), ids).show())
    return 0


def _run_compact(options: argparse.Namespace) -> int:
    from clipdist import compact, storage

    print(compact.compact(storage.absolute(options.output), every=options.every).show())
    return 0


def _run_cache(options: argparse.Namespace) -> int:
    from clipdist import storage
    from clipdist.cache import default_cache
    from clipdist.manifest import read_manifest
    from clipdist.report import file_size
    from clipdist.search import Index

    cache = default_cache()
    if options.clear:
        cache.clear()
    if options.embeddings:
        for table in read_manifest(storage.absolute(options.embeddings), "embeddings").planned:
            Index.open(options.embeddings, table, cache=cache).shards.warm()
    print(
        _facts(
            [("folder", cache.folder), ("size", f"{file_size(cache.size_bytes())} of {file_size(cache.limit_bytes)}")]
        )
    )
    return 0


def _run_export(options: argparse.Namespace) -> int:
    from clipdist.export import export

    print(export(options.embeddings, options.output, options.format))
    return 0


def _run_approximate(options: argparse.Namespace) -> int:
    from clipdist.approximate import build
    from clipdist.search import Index

    pictures, texts = Index.open(options.embeddings), None
    if "texts" in pictures.shards.manifest.planned:
        texts = Index.open(options.embeddings, "texts")
    settings = {"recall": options.recall, "k": options.top, "queries": options.queries}
    print(build(pictures, texts, options.output, **settings).report)
    return 0


def _run_vocab(options: argparse.Namespace) -> int:
    from clipdist import manifest as manifests
    from clipdist import models, propose, storage

    if options.top < 1 or options.min_count < 1:
        raise UserError("--top and --min-count: expected whole numbers from 1 up")
    manifest = manifests.read_manifest(storage.absolute(options.pairs), "pairs")
    tokenizer, known = models.load_tokenizer(options.model)
    counts = propose.words(propose.captions(manifest))
    found = propose.propose(counts, tokenizer, known, options.min_count)
    if options.out:
        propose.write_terms(found[: options.top], options.out)
    print(propose.as_table(found[: options.top]))
    more = f"; the first {options.top} are shown" if len(found) > options.top else ""
    print(f"\n{len(found):,} of {len(counts):,} words are more than one token and stand there often enough{more}")
    return 0


def _run_demo(options: argparse.Namespace) -> int:
    from clipdist import demo

    return demo.run(options.folder)


def _run_starter(options: argparse.Namespace) -> int:
    from clipdist import starter

    print(_facts(starter.make_from_pairs(options.pairs, options.output, options.image_size)))
    return 0


def _facts(facts: Sequence[tuple[str, Any]]) -> str:
    longest = max((len(name) for name, _ in facts), default=0)
    return "\n".join(f"{name:<{longest}}  {value}" for name, value in facts)


if __name__ == "__main__":
    sys.exit(main())
