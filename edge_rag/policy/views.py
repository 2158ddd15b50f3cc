"""What is embedded of a chunk: one or two short views, each with its own vector; the nearest view counts.

A small sentence encoder is trained on sentences and pools a text into one vector, so a chunk of 256 tokens drowns the
one sentence that a question is about. Halves measured clearly better than wholes (docs/log.md). The heading path goes
in front because many chunks do not name their subject; the document's title does not, it is the same for all.
"""

WHOLE_TOKENS = 96  # up to this many LLM tokens a chunk is one view
MIDDLE = (0.35, 0.65)  # where the cut may fall, as shares of the length


def embedded_views(title: str, heading: str, text: str, tokens: int) -> list[str]:
    """The texts to embed for a chunk: itself when it is short, else its halves, cut at a sentence's end if possible."""
    place = heading.removeprefix(title).removeprefix(" › ")
    parts = [text] if tokens <= WHOLE_TOKENS else _halves(text)
    return [f"{place}\n{part}" if place else part for part in parts]


def _halves(text: str) -> list[str]:
    cut = _nearest_to_middle(text, ".!?\n") or _nearest_to_middle(text, " \t") or len(text) // 2
    return [part for part in (text[:cut].strip(), text[cut:].strip()) if part]


def _nearest_to_middle(text: str, ends: str) -> int:
    """The offset behind the character of `ends` that is nearest to the middle; 0 when there is none near it."""
    low, high = (int(share * len(text)) for share in MIDDLE)
    places = [place + 1 for place in range(low, high) if text[place] in ends]
    return min(places, key=lambda place: abs(2 * place - len(text)), default=0)
