"""The page shows what its user says, where the server has a recogniser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moshi_mlx

from .browser import launched, site, unavailable, visit
from .test_transcripts import recogniser  # noqa: F401

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
QUESTIONS = Path(moshi_mlx.__file__).parent / "assets" / "questions.wav"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched(QUESTIONS) as browser:
        yield browser


def test_both_speakers_are_shown_and_saved(browser: Any, recogniser: Any, tmp_path: Path) -> None:  # noqa: F811
    """If this fails, the page hides what it was told of its user's words, mixes them up with Moshi's, or loses them."""
    with site(stt=recogniser) as here, visit(browser, here.url) as page:
        page.state("ready")
        page.page.click("#main")
        page.state("talking")
        page.until("document.querySelectorAll('#log p.user b').length >= 3", 90)
        page.page.keyboard.press("Escape")
        page.state("ended")
        shown = page.page.locator("#log p.user b").all_text_contents()
        words = json.loads(page.saved("#save-json", tmp_path).read_text("utf-8"))
        text = page.saved("#save-text", tmp_path).read_text("utf-8")
        assert not page.complaints, page.complaints
    heard = [word["text"] for word in words["words"] if word["speaker"] == "user"]
    assert sorted(heard) == sorted(shown) and "(you) " in text
    starts = [word["start"] for word in words["words"]]
    assert starts == sorted(starts)
    labels = [label for _, _, label in words["alignments"]]
    assert labels.count("SPEAKER_OTHER") == len(heard)
    assert not set(words["text"].split()) & set(heard) or "SPEAKER_MAIN" in labels
