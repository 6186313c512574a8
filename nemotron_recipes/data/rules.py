"""What a declared value may be besides its type. Standard library only: `settings.py` says why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Rule:
    """What values of an annotated type are possible. Numbers are always finite. None: no bound."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    min_length: int | None = None  # of a list

    def broken(self, value: Any) -> str:
        """What `value` must be, or an empty text when it is."""
        if self.min_length is not None:
            return "" if len(value) >= self.min_length else f"have at least {self.min_length} element(s)"
        bad = not math.isfinite(value)
        bad = bad or (self.gt is not None and value <= self.gt) or (self.ge is not None and value < self.ge)
        bad = bad or (self.le is not None and value > self.le)
        if not bad:
            return ""
        if self.le is not None:
            return f"be between {self.ge:g} and {self.le:g}"
        return f"be above {self.gt:g}" if self.gt is not None else f"be {self.ge:g} or more"


Positive = Annotated[int, Rule(gt=0)]
Fraction = Annotated[float, Rule(ge=0, le=1)]
