"""From token bytes to text that may be shown: whole characters, nothing of a stop string, sentence by sentence."""

import codecs
import re
from collections.abc import Sequence

from msgspec import Struct


class TextStream:
    """Turns token bytes into text. Holds back what may yet become a character or a stop string.

    `stopped` is True once a stop string was met; it and all behind it are never given out. Of several, the one that
    begins first counts, however the text was split into tokens.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Take the bytes of one token and return the text that is now certain."""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back at the end of generation; a broken character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        sure = len(text) - keep  # no stop that is still incomplete begins before this place
        met = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=len(text))
        self.stopped = met < len(text) and met <= sure
        self._held = "" if self.stopped else text[min(met, sure) :]
        return text[: min(met, sure)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class Cut(Struct, frozen=True):
    """A stretch of text; `ends` is True when a sentence ends with it."""

    text: str
    ends: bool


# A full stop behind one of these, or behind a lone letter or a list number, ends no sentence.
_ABBREVIATIONS = frozenset(
    "e.g i.e etc vs approx no nos fig figs sec dr mr mrs ms prof st cf ca vol pp min max".split()
)
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]|\n")


class SentenceStream:
    """Cuts streamed text where sentences end, so that each can be cited as soon as it is complete."""

    def __init__(self) -> None:
        self._sentence = ""

    def feed(self, text: str) -> list[Cut]:
        """Take more text; return it whole, cut behind each sentence that is now known to have ended."""
        cuts: list[Cut] = []
        shown = len(self._sentence)
        self._sentence += text
        place = 0
        for match in _END.finditer(self._sentence):
            end = match.start() if match.group() == "\n" else match.end()
            if not _is_end(self._sentence[place:end]):
                continue
            cuts.append(Cut(self._sentence[max(place, shown) : end], ends=True))
            place = end
        rest = self._sentence[max(place, shown) :]
        self._sentence = self._sentence[place:]
        return [*cuts, Cut(rest, ends=False)] if rest else cuts

    def finish(self) -> bool:
        """Whether an unfinished sentence stands at the end of the text."""
        return bool(self._sentence.strip())


def _is_end(sentence: str) -> bool:
    text = sentence.strip()
    if not text:
        return False
    last = text.split()[-1]
    if not last.endswith("."):
        return True
    word = last.rstrip(".").lstrip("(\"'").lower()
    return word not in _ABBREVIATIONS and not (len(word) == 1 and word.isalpha()) and not text.rstrip(".").isdigit()
