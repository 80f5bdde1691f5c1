"""Captions: templates over the columns of a row, such as "{colour} {article_type}. {title}"."""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipdist.batches import Batch, column, exploded, texts
from clipdist.config import UserError
from clipdist.sources import Source


def default_captions(source: Source) -> tuple[str, ...]:
    """A folder's or tar's text, a class folder's name; a table has to say."""
    defaults = {"folder": "{text}", "webdataset": "{text}", "class_folders": "a photo of {label}"}
    if source.kind not in defaults:
        raise UserError(
            f"captions: required for a table: templates over its columns, such as "
            f'captions: ["{{{source.columns[-1]}}}"] (columns: {", ".join(source.columns)})'
        )
    return (defaults[source.kind],)


def checked_templates(captions: tuple[str, ...]) -> tuple[str, ...]:
    """The same caption templates. ValueError when one is not a plain template."""
    for template in captions:
        template_columns(template)
    return captions


def template_columns(template: str) -> list[str]:
    """The columns that a caption template names. ValueError when it is not a plain template."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f'"{template}" is no caption template: {error}') from None
    if any(spec or conversion for _, name, spec, conversion in parts if name is not None):
        raise ValueError(f'"{template}": only plain {{column}} places are allowed')
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise ValueError(f'"{template}" names no column; write one in braces, such as "{{title}}"')
    return names


def captions_of(batch: Batch, templates: Iterable[str]) -> pa.ListArray:
    """Each row's captions: one per template, without those whose columns are all empty, each once. A template that is
    one list column gives one caption per element."""
    found, rows = [pa.array([], pa.string())], [np.zeros(0, np.int64)]
    for template in templates:
        filled, row = _filled(template, batch)
        caption = pc.binary_join(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(filled)), " ")
        there = pc.not_equal(caption, "").to_numpy(zero_copy_only=False)
        found.append(caption.filter(pa.array(there)))
        rows.append(row[there])
    caption, row = pa.concat_arrays(found), np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    if len(np.unique(row)) < len(row):
        code = caption.dictionary_encode().indices.to_numpy()
        _, first = np.unique(row * len(code) + code, return_index=True)
        order = np.sort(first)[np.argsort(row[np.sort(first)], kind="stable")]
    offsets = np.zeros(len(batch) + 1, np.int32)
    np.cumsum(np.bincount(row[order], minlength=len(batch)), out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, caption.take(pa.array(order)))


def _filled(template: str, batch: Batch) -> tuple[pa.Array, np.ndarray]:
    """The texts that a template gives, "" where its columns are empty, and the row of each. Not str.format, which takes
    the dot of a column `name.en` for an attribute."""
    names, every_row = template_columns(template), np.arange(len(batch))
    if template == f"{{{names[0]}}}":
        values, row = exploded(column(batch, names[0]))
        return texts(values), every_row if row is None else row
    columns = {name: texts(column(batch, name)) for name in names}
    pieces: list[Any] = []
    for text, name, _, _ in string.Formatter().parse(template):
        pieces += [text] if name is None else [text, columns[name]]
    empty = functools.reduce(pc.and_, [pc.equal(values, "") for values in columns.values()])
    return pc.if_else(empty, "", pc.binary_join_element_wise(*pieces, "")), every_row
