"""`clipdist search --interactive`: a prompt that keeps the model loaded; each line is a query."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from clipdist.config import UserError
from clipdist.hits import Hits
from clipdist.query import Query, parse
from clipdist.searcher import Find, Searcher

HELP = """A line is a query, such as
  red summer dress
  red dress + ./pool.jpg - 0.5:floral     terms with weights; a path or URL is a picture
  id:15970                                more like a catalog row
or a command:
  :like RANK       more like a hit of the last answer
  :more            the next hits
  :top N           hits per answer
  :where CONDITION only rows that fit; :where alone: all rows
  :for images      or: :for texts
  :html FILE       a gallery of the last answer; :open shows it in the browser
  :quit            or Ctrl-D"""


@dataclass(frozen=True)
class _State:
    find: Find
    top: int
    where: str | None
    min_score: float | None
    collapse: float | None
    query: Query | None = None
    hits: Hits | None = None
    offset: int = 0


class Interactive:
    """Reads lines until the end; a mistake is told, and the next line is read."""

    def __init__(
        self,
        searcher: Searcher,
        show: Callable[[Hits], None],
        open_gallery: Callable[[Hits, str | None], None],
        find: Find,
        top: int,
        where: str | None,
        min_score: float | None,
        collapse: float | None,
    ) -> None:
        self.searcher, self.show, self.open_gallery = searcher, show, open_gallery
        self.state = _State(find, top, where, min_score, collapse)

    def run(self) -> None:
        asked = sys.stdin.isatty()
        if asked:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and keeps a history)
            print(f"{self.searcher.uri}: a query, :help, or :quit")
            threading.Thread(target=self._load_ahead).start()
        while True:
            try:
                line = input("> " if asked else "").strip()
            except EOFError:
                return
            if line in (":quit", ":q"):
                return
            try:
                if line:
                    self.state = self.answer(line)
            except UserError as error:
                print(*error.problems, sep="\n", file=sys.stderr)

    def _load_ahead(self) -> None:
        """The model, while the first query is typed. What is wrong with it is told when it is needed."""
        with contextlib.suppress(UserError):
            _ = self.searcher.encoder

    def answer(self, line: str) -> _State:
        """What follows from a line; what it finds is shown."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith(":"):
            return self._search(replace(self.state, query=parse(line), offset=0))
        match command:
            case ":help":
                print(HELP)
                return self.state
            case ":like":
                return self._search(replace(self.state, query=Query.id(self._hit(rest)), offset=0))
            case ":more":
                self._last()
                return self._search(replace(self.state, offset=self.state.offset + self.state.top))
            case ":top":
                return self._again(replace(self.state, top=_whole(rest, ":top"), offset=0))
            case ":where":
                return self._again(replace(self.state, where=rest or None, offset=0))
            case ":for":
                if rest not in ("images", "texts"):
                    raise UserError(":for: expected images or texts")
                return self._again(replace(self.state, find=rest, offset=0))  # type: ignore[arg-type]
            case ":html" | ":open":
                self.open_gallery(self._last(), rest if command == ":html" else None)
                return self.state
        raise UserError(f"{command}: no such command; :help shows them")

    def _again(self, state: _State) -> _State:
        """The last query with other settings; these are kept only when they work."""
        return state if state.query is None else self._search(state)

    def _search(self, state: _State) -> _State:
        hits = self.searcher.find(
            state.query,
            state.top,
            state.find,
            where=state.where,
            offset=state.offset,
            min_score=state.min_score,
            collapse=state.collapse,
        )
        self.show(hits)
        return replace(state, hits=hits)

    def _last(self) -> Hits:
        if self.state.hits is None:
            raise UserError("nothing was searched yet")
        return self.state.hits

    def _hit(self, rank: str) -> str:
        place = _whole(rank, ":like") - 1 - self.state.offset
        hits = self._last()
        if not 0 <= place < len(hits):
            raise UserError(f":like: the last answer has no rank {rank}")
        return hits[place].id.rpartition("#")[0] if self.state.find == "texts" else hits[place].id


def _whole(text: str, command: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{command}: expected a whole number from 1 up")
    return int(text)
