"""The quickstart's text and task: the language reference that Python carries, in three parts, and fill-in pairs."""

from __future__ import annotations

import hashlib
import random
import re
import sys

from quickstart_report import QuickstartError

PART_SHARES = {"base": 0.60, "train": 0.30, "heldout": 0.10}
FUNCTION_WORDS = {
    *("a", "an", "and", "are", "as", "at", "be", "by", "can", "for", "from", "has", "if", "in", "is", "it", "its"),
    *("not", "of", "on", "or", "that", "the", "this", "to", "was", "when", "which", "with"),
}
NUM_GAPS = 3


def load_topics() -> dict[str, str]:
    """The language reference of this Python, topic name -> text. Its wording differs a little between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        message = "this Python has no pydoc_data.topics, the quickstart's text; use a full installation"
        raise QuickstartError(f"{sys.executable}: {message}") from None
    return dict(topics)


def split_topics(topics: dict[str, str]) -> dict[str, list[str]]:
    """Cut the text by topic into the parts of PART_SHARES; return each part's paragraphs.

    Long topics quote short ones whole ("compound" contains "while"), so a paragraph belongs to the smallest topic it
    stands in and is dropped from the others: parts share no paragraph. Topics are dealt in an order that depends on
    their names only, each to the part that is then least full.
    """
    owner: dict[str, tuple[str, str]] = {}  # paragraph without its line breaks -> (topic, paragraph as printed)
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if key:
                owner.setdefault(key, (name, paragraph.strip("\n")))
    paragraphs: dict[str, list[str]] = {name: [] for name in topics}
    for name, paragraph in owner.values():
        paragraphs[name].append(paragraph)

    parts: dict[str, list[str]] = {part: [] for part in PART_SHARES}
    num_chars = dict.fromkeys(PART_SHARES, 0)
    for name in sorted(topics, key=digest):
        size = sum(map(len, paragraphs[name]))
        part = min(PART_SHARES, key=lambda part: (num_chars[part] + size) / PART_SHARES[part])
        parts[part] += paragraphs[name]
        num_chars[part] += size
    return parts


def sentences(paragraphs: list[str]) -> list[str]:
    """The prose sentences of `paragraphs`, each once: tables, grammar, code and headings are left out."""
    found: dict[str, None] = {}
    for paragraph in paragraphs:
        if re.search(r"::=|>>>|^\s*[+|]|^\s*[*=\-~]{4,}|^ {6,}", paragraph, re.MULTILINE):
            continue
        for sentence in re.split(r'(?<=[.!?]) +(?=[A-Z"(*])', " ".join(paragraph.split())):
            if re.match(r'["A-Z]', sentence) and sentence.endswith(".") and 60 <= len(sentence) <= 170:
                found[sentence] = None
    return list(found)


def make_pairs(texts: list[str], num_pairs: int, seed: int) -> list[dict[str, str]]:
    """Blank NUM_GAPS function words per sentence; return prompt/completion records.

    Sentences are gone through again, with other gaps, until there are `num_pairs` records or eight rounds are over.
    """
    records: dict[str, str] = {}
    for round_number in range(8):
        for text in texts:
            words = text.split(" ")
            candidates = [index for index, word in enumerate(words) if word in FUNCTION_WORDS]
            if len(candidates) < NUM_GAPS or len(records) == num_pairs:
                continue
            # Seeded by the sentence: a record does not depend on the records before it.
            gaps = sorted(random.Random(f"{seed} {round_number} {text}").sample(candidates, NUM_GAPS))
            blanked = " ".join("_" if index in gaps else word for index, word in enumerate(words))
            records[f"Text: {blanked}\nMissing words:"] = " " + ", ".join(words[index] for index in gaps)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in records.items()]


def group_documents(paragraphs: list[str], num_chars: int = 500) -> list[str]:
    """Join neighbouring paragraphs to documents of at least `num_chars` (but for the last one)."""
    documents = [""]
    for paragraph in paragraphs:
        if len(documents[-1]) >= num_chars:
            documents.append("")
        documents[-1] += ("\n\n" if documents[-1] else "") + paragraph
    return documents


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
