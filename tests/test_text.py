"""The text side of a stream: ids to display text, ids to timed words."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from moshi_mlx.engine.text import BOS, EOS, EPAD, PAD, TextTokenizer, Word, WordTracker
from moshi_mlx.errors import CheckpointError, StateError, TokenError
from moshi_mlx.state import load_state, save_state
from tests.helpers.tokenizer import CORPUS, tokenizer_bytes, train_tokenizer

SENTENCES = [
    "Good morning, did you sleep well?",
    "The café on the corner",
    "a party 🎉 with cake 🍰 for 12 €",
    "日本語のテキスト",
    "ไทย",
    "e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}",
    "👩\N{ZERO WIDTH JOINER}🚀 flies",
    "x",
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(tokenizer_bytes())


def ids_of(tokenizer: TextTokenizer, *pieces: str) -> list[int]:
    """Ids of pieces by name; the tests below write streams as people read them."""
    table = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    return [table[piece] for piece in pieces]


def bytes_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in text.encode()))


def track(tokenizer: TextTokenizer, ids: list[int], first: int = 0) -> list[Word]:
    tracker = WordTracker(tokenizer)
    words = [word for frame, token in enumerate(ids, first) for word in tracker.step(frame, token)]
    return words + tracker.flush()


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_special_ids_are_kyutais(tokenizer: TextTokenizer) -> None:
    """If this fails, the trained test models no longer have the marks where real checkpoints have them."""
    assert [tokenizer.piece(i) for i in (EPAD, BOS, EOS, PAD)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.piece(4) == "<0x00>" and tokenizer.byte(4 + 0x41) == 0x41
    assert tokenizer.byte(EPAD) is None and tokenizer.is_silent(PAD) and not tokenizer.is_silent(4)


def test_path_and_bytes_give_the_same_tokenizer(tmp_path: Path) -> None:
    """If this fails, a tokenizer read from a checkpoint folder differs from the one in memory."""
    path = train_tokenizer(tmp_path / "tokenizer.model", 400)
    loaded = [TextTokenizer(path), TextTokenizer(str(path)), TextTokenizer(path.read_bytes())]
    for line in CORPUS.read_text(encoding="utf-8").splitlines()[::40]:
        assert len({tuple(tokenizer.encode(line)) for tokenizer in loaded}) == 1
    assert {tokenizer.vocab_size for tokenizer in loaded} == {400}


@pytest.mark.parametrize("contents", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"\x00" * 100])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, contents: bytes) -> None:
    """If this fails, a broken download ends in a traceback of SentencePiece's internals."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="tokenizer.model .* is not a SentencePiece model"):
        TextTokenizer(path)
    with pytest.raises(CheckpointError, match="the given bytes"):
        TextTokenizer(contents)


def test_a_model_with_a_changed_letter_is_refused() -> None:
    """If this fails, one damaged byte in a piece ends in a UnicodeDecodeError while the model loads."""
    whole = tokenizer_bytes()
    at = whole.index("▁The".encode())
    with pytest.raises(CheckpointError):
        TextTokenizer(whole[:at] + b"\xff" + whole[at + 1 :])


def test_a_truncated_model_is_refused() -> None:
    """If this fails, half a download loads and prints wrong text, or crashes the process."""
    whole = tokenizer_bytes()
    for size in (1, 7, len(whole) // 2 + 1, len(whole) - 1):
        with pytest.raises(CheckpointError):
            TextTokenizer(whole[:size])


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    """If this fails, the message no longer says which file is missing."""
    for path in (tmp_path / "nowhere.model", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            TextTokenizer(path)


@pytest.mark.parametrize("token", [-2, -1, 600, 32000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: TextTokenizer, token: int) -> None:
    """If this fails, the zero token, the start token or another model's ids print some random piece."""
    stream = tokenizer.detokenizer()
    for call in (tokenizer.piece, tokenizer.byte, tokenizer.is_silent, stream.step):
        with pytest.raises(TokenError, match=f"text token {token} is outside .* 600 pieces"):
            call(token)
    with pytest.raises(TokenError):
        WordTracker(tokenizer).step(0, token)


# --- ids to text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", SENTENCES)
def test_text_survives_the_round_trip(tokenizer: TextTokenizer, sentence: str) -> None:
    """If this fails, display text differs from what SentencePiece itself decodes."""
    ids = tokenizer.encode(sentence)
    assert tokenizer.decode(ids) == tokenizer._model.DecodeIds(ids)
    assert tokenizer.decode(ids, strip_leading_space=False) == " " + tokenizer.decode(ids)
    padded = [mark for token in ids for mark in (token, PAD, EPAD, BOS, EOS)]
    assert tokenizer.decode(padded) == tokenizer.decode(ids)


def test_the_corpus_survives_the_round_trip(tokenizer: TextTokenizer) -> None:
    """If this fails, some ordinary sentence prints wrongly."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 300
    assert any(tokenizer.byte(i) is not None for line in lines for i in tokenizer.encode(line))
    for line in lines:
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == tokenizer._model.DecodeIds(ids)


def test_marks_print_nothing(tokenizer: TextTokenizer) -> None:
    """If this fails, <s>, </s> or ⁇ leak into the text a person reads."""
    assert tokenizer.decode([EPAD, BOS, EOS, PAD] * 5) == ""


def test_a_character_of_bytes_comes_once_and_whole(tokenizer: TextTokenizer) -> None:
    """If this fails, emoji print as <0xF0><0x9F>... or as four broken characters."""
    stream = tokenizer.detokenizer()
    said = [stream.step(token) for token in bytes_of(tokenizer, "🎉é")]
    assert said == ["", "", "", "🎉", "", "é"]
    assert not stream.pending and stream.flush() == ""


def test_a_broken_character_prints_as_replacement(tokenizer: TextTokenizer) -> None:
    """If this fails, a cut byte sequence swallows or garbles the text after it."""
    first, second = bytes_of(tokenizer, "🎉")[:2]
    (the,) = ids_of(tokenizer, "▁The")
    stream = tokenizer.detokenizer()
    assert [stream.step(t) for t in (the, first, second)] == ["The", "", ""]
    assert stream.pending
    assert stream.step(the) == "\ufffd The"
    assert stream.step(first) == "" and stream.flush() == "\ufffd" and stream.flush() == ""
    assert stream.step(second) == "\ufffd"  # a continuation byte that nothing began


def test_random_ids_agree_with_one_decode(tokenizer: TextTokenizer) -> None:
    """If this fails, an untrained model's text depends on how the stream was cut, or breaks UTF-8."""
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(5000)]
    stream = tokenizer.detokenizer(strip_leading_space=False)
    text = "".join([*map(stream.step, ids), stream.flush()])
    expected = b"".join(
        b"" if i < 4 else bytes([i - 4]) if i < 260 else b"\x00SPLIT" + tokenizer.piece(i).replace("▁", " ").encode()
        for i in ids
    )
    # Each piece of letters ends the bytes before it, so the bytes of one run are decoded apart from the next.
    runs = expected.split(b"\x00SPLIT")
    assert text == "".join(run.decode("utf-8", "replace") for run in runs)


def test_only_the_first_space_is_stripped(tokenizer: TextTokenizer) -> None:
    """If this fails, a reply begins with a space, or words after a reset or flush run together."""
    stream = tokenizer.detokenizer()
    space, the = ids_of(tokenizer, "▁", "▁The")
    assert [stream.step(PAD), stream.step(space), stream.step(the), stream.step(the)] == ["", "", " The", " The"]
    stream.flush()
    assert stream.step(the) == "The"
    stream.reset()
    assert stream.step(the) == "The"


def test_save_restore_replay(tokenizer: TextTokenizer) -> None:
    """If this fails, a resumed session's text differs from one that was never interrupted."""
    ids = tokenizer.encode("a 🎉 party for 12 €")
    for cut in range(len(ids)):
        first, second = tokenizer.detokenizer(), tokenizer.detokenizer()
        head = "".join(map(first.step, ids[:cut]))
        state = first.snapshot()
        second.step(ids[-1])
        second.restore(state)
        for stream in (first, second):
            assert head + "".join(map(stream.step, ids[cut:])) == "a 🎉 party for 12 €"


def test_words_go_on_in_another_process(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """If this fails, a conversation that was saved loses or splits the word that was being said."""
    ids = [EPAD, *tokenizer.encode("a 🎉 party for 12 €"), PAD, PAD, EPAD, *tokenizer.encode("extraordinarily")]
    whole = track(tokenizer, ids)
    for cut in range(len(ids)):
        first, second = WordTracker(tokenizer), WordTracker(tokenizer)
        head = [word for frame in range(cut) for word in first.step(frame, ids[frame])]
        save_state(tmp_path / "text.safetensors", first.snapshot())
        second.restore(load_state(tmp_path / "text.safetensors", second.snapshot()))
        rest = [word for frame in range(cut, len(ids)) for word in second.step(frame, ids[frame])]
        assert head + rest + second.flush() == whole


def test_a_damaged_snapshot_of_text_is_refused(tokenizer: TextTokenizer) -> None:
    """If this fails, a file that was changed puts nonsense into a conversation, or ends it with a traceback."""
    tracker = WordTracker(tokenizer)
    tracker.step(3, ids_of(tokenizer, "▁The")[0])
    good = tracker.snapshot()
    changes = {
        "word": np.array([[-1, 65] + [-1] * 62]),
        "start": np.array([-5]),
        "marked": np.array([7]),
        "frame": np.array([1, 2]),
        "stream": {**good["stream"], "pending": np.array([[300, -1, -1]])},
    }
    for name, value in changes.items():
        with pytest.raises(StateError, match="snapshot of a text"):
            tracker.restore({**good, name: value})
    assert tracker.flush() == [Word("The", 0.24, 0.8)]


# --- ids to words ----------------------------------------------------------------------------------------------------


def test_words_start_at_their_first_piece_and_end_at_the_next(tokenizer: TextTokenizer) -> None:
    """If this fails, subtitles are early or late against the audio."""
    the, t, h, e = ids_of(tokenizer, "▁The", "▁t", "h", "e")
    words = track(tokenizer, [PAD, EPAD, the, PAD, EPAD, t, h, e, PAD, the])
    assert words == [Word("The", 0.16, 0.4), Word("the", 0.4, 0.72), Word("The", 0.72, 1.28)]


def test_a_pause_ends_a_word(tokenizer: TextTokenizer) -> None:
    """If this fails, a word before a long silence lasts until the next sentence, or is only told then."""
    (the,) = ids_of(tokenizer, "▁The")
    tracker = WordTracker(tokenizer)
    assert tracker.step(10, the) == []
    told = [frame for frame in range(11, 30) if tracker.step(frame, PAD)]
    assert told == [10 + WordTracker.TAIL_FRAMES + 1]
    assert tracker.flush() == []
    # Frames that were never given count as padding too.
    tracker.step(0, the)
    assert tracker.step(100, the) == [Word("The", 0.0, 0.08 * (1 + WordTracker.TAIL_FRAMES))]


def test_pieces_without_a_space_belong_to_the_word(tokenizer: TextTokenizer) -> None:
    """If this fails, punctuation or syllables after padding become words of their own."""
    the, comma, s = ids_of(tokenizer, "▁The", ",", "s")
    assert [word.text for word in track(tokenizer, [the, PAD, s, PAD, comma, EPAD, the])] == ["Thes,", "The"]


def test_a_mark_splits_words_that_write_no_spaces(tokenizer: TextTokenizer) -> None:
    """If this fails, Japanese or Thai comes as one endless word although the model marked the words."""
    ids = [EPAD, *bytes_of(tokenizer, "語"), PAD, EPAD, *bytes_of(tokenizer, "日本")]
    assert track(tokenizer, ids) == [Word("語", 0.08, 0.48), Word("日本", 0.48, 1.44)]


def test_a_character_of_bytes_starts_at_its_first_byte(tokenizer: TextTokenizer) -> None:
    """If this fails, an emoji is timed three frames late."""
    (space,) = ids_of(tokenizer, "▁")
    party = bytes_of(tokenizer, "🎉")
    assert track(tokenizer, party)[0].start == 0.0
    assert track(tokenizer, [space, *party], first=5)[0].start == 0.4
    assert track(tokenizer, [space, PAD, PAD, *party])[0].start == 0.24
    assert track(tokenizer, [*party[:2], PAD, *party[2:]]) == [Word("🎉", 0.0, 0.88)]


def test_a_stream_that_ends_inside_a_character(tokenizer: TextTokenizer) -> None:
    """If this fails, the end of a conversation loses its last word or crashes."""
    the, *cut = [*ids_of(tokenizer, "▁The"), *bytes_of(tokenizer, "🎉")[:2]]
    assert [word.text for word in track(tokenizer, [the, *cut])] == ["The\ufffd"]
    assert [word.text for word in track(tokenizer, cut)] == ["\ufffd"]
    assert [word.text for word in track(tokenizer, [*cut, the])] == ["\ufffd", "The"]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_words_are_the_displayed_text(tokenizer: TextTokenizer, sentence: str) -> None:
    """If this fails, a transcript's words and its text say different things."""
    ids = [PAD, *tokenizer.encode(sentence), PAD]
    words = track(tokenizer, ids)
    assert [word.text for word in words] == tokenizer.decode(ids).split()
    assert all(first.end <= second.start for first, second in zip(words, words[1:]))
    assert all(0 < word.end - word.start for word in words)


def test_nothing_grows_without_a_space(tokenizer: TextTokenizer) -> None:
    """If this fails, a model that never writes a space fills the memory with one word."""
    (letter,) = ids_of(tokenizer, "e")
    words = track(tokenizer, [letter] * 1000)
    assert "".join(word.text for word in words) == "e" * 1000
    assert max(len(word.text) for word in words) == WordTracker.MAX_LETTERS


def test_random_ids_give_ordered_words(tokenizer: TextTokenizer) -> None:
    """If this fails, an untrained model's transcript has overlapping, empty or negative words, or loses letters."""
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.choice([PAD, EPAD, rng.randrange(tokenizer.vocab_size)]) for _ in range(200)]
        words = track(tokenizer, ids)
        assert all(word.text and word.start <= word.end for word in words)
        assert all(first.end <= second.start + 1e-9 for first, second in zip(words, words[1:]))
        assert "".join(word.text for word in words) == "".join(tokenizer.decode(ids).split())


def test_frames_must_rise(tokenizer: TextTokenizer) -> None:
    """If this fails, a caller that passes one frame twice gets words with wrong times instead of an error."""
    tracker = WordTracker(tokenizer)
    tracker.step(3, PAD)
    with pytest.raises(TokenError, match="frame 3 comes after frame 3"):
        tracker.step(3, PAD)
    tracker.flush()
    tracker.step(0, PAD)
