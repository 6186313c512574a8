"""Rows in other languages than those wanted, as py3langid guesses them (a naive Bayes model over byte n-grams)."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from nemotron_recipes.data.gate_settings import Language
from nemotron_recipes.data.gates import Candidate, Drop, Quote, Verdict
from nemotron_recipes.data.gates.simple import Gate
from nemotron_recipes.data.gates.text import said
from nemotron_recipes.errors import Problem, UserError

_MOST = 4000  # characters looked at: more don't make the guess better


class LanguageGate(Gate):
    """Reasons: other_language, language_unclear. Users' and assistants' turns count, in the order of the row."""

    settings: Language
    name = "language"

    @property
    def key(self) -> Any:
        _identifier()
        return [super().key, version("py3langid")]

    def open(self) -> None:
        _identifier()

    def check(self, candidate: Candidate) -> Verdict:
        text = "\n".join(said(candidate.row, ("user", "assistant")))[:_MOST]
        if len(text) < self.settings.min_chars:
            return None
        language, probability = _identifier().classify(text.encode("utf-8", "replace").decode("utf-8"))
        if probability < self.settings.min_probability:
            return Drop("language_unclear", Quote(f"{language}, {probability:.0%}: ", text))
        if language not in self.settings.allow:
            return Drop("other_language", Quote(f"{language}, {probability:.0%}: ", text))
        return None


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        fix = "pip install 'nemotron-recipes[gates]'"
        raise UserError(Problem("data.gates.language needs the 'py3langid' library", fix=fix)) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
