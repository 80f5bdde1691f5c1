"""Rejects of a run, judged: against a limit, and as soon as nearly everything fails."""

from __future__ import annotations

from collections import Counter

from clipdist.config import UserError
from clipdist.ledger import Ledger

OTHER_INPUT = {
    "pairs": "choose a new output for a changed table",
    "embeddings": "mend the table and run with update=mirror",
}
HOPELESS_ROWS, HOPELESS_FRACTION = 200, 0.9
"""After this many rows a job stops when this share of them was rejected: a wrong folder, missing credentials."""


class Tally:
    """Rows planned and rejected so far, per table and reason: of this plan, and of the state that it adds to."""

    def __init__(self, ledger: Ledger, max_rejected_fraction: float, *, retry_follows: bool = False) -> None:
        """`retry_follows`: what was rejected is tried again at once, so the limit does not count yet."""
        self.ledger, self.limit, self.retry_follows = ledger, max_rejected_fraction, retry_follows
        self.planned: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}
        self.here: Counter[tuple[str, str]] = Counter()
        """(table, "planned" or "lost") of this run alone: what an earlier one met may be mended."""
        known = ledger.stamp.recorded.get("tried_again", {}) if ledger.purpose == "update" else {}
        self.bad_before = Counter[str](known)
        """Rows of an update that were rejected before: no wonder if these are lost again."""
        for record in ledger.records():
            self._add(record["planned"], record["rejected"])

    def add(self, planned: dict[str, int], rejected: dict[str, dict[str, int]]) -> None:
        """What a unit of this run gave."""
        self._add(planned, rejected)
        for table, rows in planned.items():
            self.here[table, "planned"] += rows
            self.here[table, "lost"] += sum(rejected.get(table, {}).values())

    def _add(self, planned: dict[str, int], rejected: dict[str, dict[str, int]]) -> None:
        self.planned.update(planned)
        for table, reasons in rejected.items():
            self.reasons.setdefault(table, Counter()).update(reasons)

    def rejected(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.reasons.values())

    def stop_if_hopeless(self) -> None:
        """UserError when the limit is certain to be passed, or nearly everything fails."""
        for table, rows in self.planned.items():
            new = self.ledger.purpose in ("make", "update") and self.limit < HOPELESS_FRACTION
            seen, lost = (self.here[table, what] - self.bad_before[table] for what in ("planned", "lost"))
            if new and seen >= HOPELESS_ROWS and lost >= HOPELESS_FRACTION * seen:
                raise UserError(self._failure(table, self.here[table, "planned"], self.here[table, "lost"]))
            # How many texts there will be is not known before the end.
            certain = not self.retry_follows and table != "texts"
            if certain and self._too_many(table, max(rows, int(self.ledger.unit_rows.sum()))):
                raise UserError(self._failure(table, rows, sum(self.reasons[table].values())))

    def mostly_lost(self) -> bool:
        """Whether nearly all rows of this plan that were tried are rejects."""
        return any(
            sum(self.reasons.get(table, Counter()).values()) >= HOPELESS_FRACTION * rows
            for table, rows in self.planned.items()
            if rows
        )

    def judge(self) -> None:
        """UserError when more than the limit was rejected in the end."""
        for table, rows in self.planned.items():
            if self._too_many(table, rows):
                raise UserError(self._failure(table, rows, sum(self.reasons[table].values())))

    def _too_many(self, table: str, rows: int) -> bool:
        base = self.ledger.base
        lost = sum(self.reasons.get(table, Counter()).values()) + base.lost(table)
        return lost > self.limit * (rows + base.planned.get(table, 0))

    def _failure(self, table: str, rows: int, lost: int) -> str:
        lines = [
            f"{lost:,} of {rows:,} {table} were rejected ({100 * lost / max(rows, 1):.1f} %); "
            f"max_rejected_fraction allows {100 * self.limit:.1f} %. Nothing was published."
        ]
        lines += [f"  {count:>8,}  {reason}" for reason, count in self.reasons[table].most_common()]
        lines += ["  for example:"] + [f"    {example}" for example in self.ledger.reject_examples(3)]
        lines.append("  Mend the pictures and run the same command with retry_rejected=true (only these rows are tried")
        lines.append(f"  again), or {OTHER_INPUT[self.ledger.stamp.kind]}, or raise max_rejected_fraction.")
        return "\n".join(lines)
