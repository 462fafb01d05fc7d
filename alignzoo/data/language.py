"""The language of a text: by the library py3langid where it is installed, else the script that it is written in."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache, lru_cache
from typing import Any

MISSING = "scripts, not languages: `pip install 'alignzoo[lint]'` brings py3langid, which tells languages"
_NO_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|<[^<>\n]{1,80}>", re.DOTALL)
_LEAST = 40  # letters; shorter texts are too often taken for another language
_DENSE = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}  # scripts whose letters say more: a quarter of them is enough
_READ = 300  # characters that are looked at: more cost time and tell no more
_SURE = 0.8  # probability
_LEFT_OUT = {"wuu", "yue"}  # Wu and Cantonese: what is written in Han is nearly always Chinese


class Languages:
    """`of` names the language of a text as ISO 639 does, or its script; "" where it is too short or not clear."""

    def __init__(self) -> None:
        self._identifier = identifier()

    @property
    def known(self) -> bool:
        """Whether languages are told, not scripts alone."""
        return self._identifier is not None

    def of(self, text: str) -> str:
        prose = _NO_PROSE.sub(" ", text[: 4 * _READ])[:_READ]
        letters = [c for c in prose if c.isalpha()]
        if sum(4 if script(letter) in _DENSE else 1 for letter in letters) < _LEAST:
            return ""
        if self._identifier is not None:
            language, _ = self._identifier.classify(prose)
            return "" if language == "und" else str(language)
        name, count = Counter(map(script, letters)).most_common(1)[0]
        return name.lower() if count >= _SURE * len(letters) else ""


@cache
def identifier() -> Any:
    """py3langid's, with the model that comes in its wheel; None where it is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_SURE)
    made.set_languages([label for label in made.labels if label not in _LEFT_OUT])
    return made


@lru_cache(maxsize=65536)
def script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK and so on: the first word of a letter's name in Unicode."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
