"""Text, a picture, a path, a URL or a catalog id -> hits with description, score and picture."""

from __future__ import annotations

import io
import os
import threading
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipdist import images, storage
from clipdist.cache import DiskCache
from clipdist.config import UserError, together
from clipdist.hits import Hit, Hits
from clipdist.images import BadImage
from clipdist.manifest import read_manifest
from clipdist.pictures import read_picture
from clipdist.query import Picture, Query, Term
from clipdist.search import Index, Where
from clipdist.shards import row_of_id

if TYPE_CHECKING:
    from clipdist.query_encoder import QueryEncoder

Find = Literal["images", "texts"]


class Searcher:
    """Searches one embeddings artefact. The model that made it is loaded with the first text or picture that is asked,
    and kept; queries by catalog id or by vector need neither model nor torch.

    Every search takes `k` hits and: `where`, only rows that fit; `offset`, how many of the best to pass over;
    `min_score`; `collapse`, the cosine from which on a hit is a near-duplicate of a better one and left out (see
    `Index.search`).
    Raises UserError for a query that cannot be read, and for a model other than the one that made the embeddings.
    """

    def __init__(
        self,
        embeddings: str,
        model: str | None = None,
        *,
        device: str = "cpu",
        allow_private_hosts: bool = False,
        cache: DiskCache | None = None,
    ) -> None:
        """`model`: where the model lies, only when it is no longer where it was."""
        self.uri, self.model, self.device, self.cache = embeddings, model, device, cache
        self.allow_private_hosts = allow_private_hosts
        self._loading = threading.Lock()
        self.stamp = read_manifest(storage.absolute(embeddings), "embeddings").stamp

    @cached_property
    def _encoder(self) -> QueryEncoder:
        from clipdist.query_encoder import QueryEncoder  # torch and open_clip: seconds

        return QueryEncoder(self.uri, self.stamp, self.model, self.device)

    @property
    def encoder(self) -> QueryEncoder:
        """What embeds texts and pictures. UserError when the model is gone, or another one."""
        with self._loading:
            return self._encoder

    @cached_property
    def images(self) -> Index:
        return Index.open(self.uri, "images", cache=self.cache, device=self.device)

    @cached_property
    def texts(self) -> Index:
        return Index.open(self.uri, "texts", cache=self.cache, device=self.device)

    def find_image_from_text(self, text: str, k: int = 10, where: Where | None = None, **more: Any) -> Hits:
        """The k pictures nearest to a text."""
        return self.find(Query.text(text), k, where=where, **more)

    def find_text_from_image(self, picture: Picture, k: int = 10, where: Where | None = None, **more: Any) -> Hits:
        """The k captions nearest to a picture: a path, an http(s) URL, a PIL picture or an array of pixels."""
        return self.find(Query.image(picture), k, "texts", where=where, **more)

    def find_image_from_image(self, picture: Picture, k: int = 10, where: Where | None = None, **more: Any) -> Hits:
        """The k pictures nearest to a picture; a catalog picture finds itself first."""
        return self.find(Query.image(picture), k, where=where, **more)

    def find_image_from_id(self, row_id: str, k: int = 10, where: Where | None = None, **more: Any) -> Hits:
        """More like this one: the k pictures nearest to a catalog picture, itself left out."""
        return self.find(Query.id(row_id), k, where=where, **more)

    def find(
        self,
        query: Any,
        k: int = 10,
        find: Find = "images",
        *,
        where: Where | None = None,
        offset: int = 0,
        min_score: float | None = None,
        collapse: float | None = None,
    ) -> Hits:
        """The k pictures or texts nearest to any query (`clipdist.query.Query`, or what `Query.of` takes). Rows that
        are asked with by their ids are left out."""
        asked = Query(query).opened(self.open_picture)
        if k < 1 or offset < 0:
            raise UserError(f"expected at least 1 hit and an offset of at least 0, got {k} and {offset}")
        index = self.images if find == "images" else self.texts
        wanted = offset + k + len(asked.ids)
        found = index.search(asked.vector(self._embed), wanted, where, min_score=min_score, collapse=collapse)
        own = asked.ids if find == "images" else set()
        kept = [place for place, row_id in enumerate(found.ids[0]) if row_id not in own][offset : offset + k]
        described = index.describe(found.rows[0][kept])
        ranked = enumerate(zip(described, found.scores[0][kept], strict=True), 1 + offset)
        hits = tuple(self._hit(row, score, rank) for rank, (row, score) in ranked)
        return Hits(str(asked), hits, self._asked_with(asked.only))

    def ready(self, query: Any) -> Query:
        """The query with its pictures read and its catalog rows known to be there; UserError otherwise."""
        opened = Query(query).opened(self.open_picture)
        together(*(partial(self._embed, term) for term in opened.terms if term.kind in ("id", "vector")))
        return opened

    def vector(self, query: Any) -> NDArray[np.float32]:
        """The L2-normalised vector of a query, float32 [dim]."""
        return Query(query).opened(self.open_picture).vector(self._embed)

    def embed_text(self, text: str) -> NDArray[np.float32]:
        return self.encoder.text(text)

    def embed_image(self, picture: Picture) -> NDArray[np.float32]:
        return self.encoder.image(self.open_picture(picture))

    def open_picture(self, picture: Picture) -> Image.Image:
        return open_picture(picture, allow_private_hosts=self.allow_private_hosts)

    def _embed(self, term: Term) -> NDArray[Any]:
        match term.kind:
            case "text":
                return self.embed_text(term.value)
            case "image":
                return self.encoder.image(term.value)  # opened by `find`
            case "id":
                try:
                    return self.images.vector(term.value)
                except KeyError:
                    raise UserError(f'{self.uri}: no picture has the id "{term.value}"') from None
        if len(term.value) != self.images.dim:
            raise UserError(f"a vector of {len(term.value)} numbers; {self.uri} has {self.images.dim} dimensions")
        return np.asarray(term.value)

    def _asked_with(self, term: Term | None) -> Image.Image | Hit | None:
        """The picture, or the catalog row, that a query is."""
        if term is None or term.kind != "id":
            return term.value if term is not None and term.kind == "image" else None
        row = row_of_id(self.images.shards, term.value)
        return None if row is None else self._hit(self.images.describe(np.array([row]))[0], 1.0, 1)

    def _hit(self, row: dict[str, Any], score: float, rank: int) -> Hit:
        own = ("id", "caption", "image_uri")
        columns = {name: value for name, value in row.items() if name not in own and value is not None}
        return Hit(row["id"], row["caption"], float(score), row["image_uri"], columns, self.allow_private_hosts, rank)


def open_picture(picture: Picture, *, allow_private_hosts: bool = False) -> Image.Image:
    """A query picture, decoded as the catalog's are. UserError with the reason when that fails."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or 0 in picture.shape:
            shape = f"{picture.dtype} {list(picture.shape)}"
            raise UserError(f"an array of pixels must be uint8 [height, width] or [height, width, 3], not {shape}")
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        upright, buffer = ImageOps.exif_transpose(picture), io.BytesIO()
        plain = upright.convert("RGB") if upright.mode in ("CMYK", "YCbCr", "HSV", "LAB", "F") else upright
        plain.save(buffer, "PNG", compress_level=0)
        return images.decode(buffer.getvalue())  # transparency and 16 bits as in the catalog
    name = str(picture)
    web = name.lower().startswith(("http://", "https://"))
    uri = name if web else storage.absolute(os.path.expanduser(name))
    try:
        return images.decode(read_picture(uri, allow_private_hosts=allow_private_hosts))
    except BadImage as error:
        raise UserError(f"{name}: {error.reason}: {str(error).removeprefix(f'{name}: ')}") from None
