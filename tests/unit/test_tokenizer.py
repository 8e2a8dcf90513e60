"""The tokenizer and the detokenizer, with a small model and, if present, with larger ones."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from milliways.model.config import GROK_1
from milliways.model.detokenizer import IncrementalDetokenizer
from milliways.model.errors import InvalidRequestError, TokenizerError
from milliways.model.tokenizer import Tokenizer
from milliways.router.requests.admission import RoutedRequest, make_sequences
from milliways.router.requests.request import GenerationRequest

REPO = Path(__file__).parents[2]
DEMO_FILE = REPO / "model" / "demo" / "tokenizer.model"
GROK_1_DIR = REPO.parent / "shared" / "grok1-tokenizer"
NO_GROK_1 = "Grok-1's tokenizer is not beside the repository"

PAD, BOS, EOS, UNK = range(4)
USER_DEFINED = ["\n", "\n\n", "\t", "  ", "    ", "<|separator|>", "<|control1|>"]
SENTENCES = [
    "At the end of the universe stands a restaurant, and at its tables wait the patient.",
    "The river runs past the mill ways and the mill wheel turns with the river.",
    "Wer zuerst kommt, mahlt zuerst; größer, höher, süßer.",
    "def mill(grain): return [flour for flour in grain if flour > 1234567890]",
]
TEXTS = [
    "",
    " ",
    "   ",
    "hello world",
    " hello world",
    "hello  world ",
    "a\nb\n\n\tc",
    "2026 + 17",
    "größer 😀 𒀀 漢字 \u200d \u0301e",
    "<|separator|>x<|control1|>",
    "[EOS] is text",
    "nul \x00 and replacement \ufffd",
    "the mill " * 300,
]


def train_small_tokenizer(**overrides: Any) -> bytes:
    """A SentencePiece model with Grok-1's conventions and a vocabulary of 400 pieces."""
    written = io.BytesIO()
    conventions: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": USER_DEFINED,
        "pad_id": PAD,
        "bos_id": BOS,
        "eos_id": EOS,
        "unk_id": UNK,
        "pad_piece": "[PAD]",
        "bos_piece": "[BOS]",
        "eos_piece": "[EOS]",
        "unk_piece": "[UNK]",
        "unk_surface": "[UNK]",
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        minloglevel=2,
        **(conventions | overrides),
    )
    return written.getvalue()


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(train_small_tokenizer())
    return path


@pytest.fixture(scope="session", params=["small", "demo", "grok-1"])
def tokenizer_file(request: pytest.FixtureRequest, small_file: Path) -> Path:
    files = {
        "small": small_file,
        "demo": DEMO_FILE,
        "grok-1": GROK_1_DIR / "tokenizer.model",
    }
    path = files[request.param]
    if request.param == "grok-1" and not path.is_file():
        pytest.skip(NO_GROK_1)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file, None)


@pytest.fixture(scope="session")
def processor(tokenizer_file: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(tokenizer_file))


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    path = GROK_1_DIR / "golden.json"
    if not path.is_file():
        pytest.skip(NO_GROK_1)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def grok_1(golden: dict[str, Any]) -> Tokenizer:
    return Tokenizer.load(GROK_1_DIR / "tokenizer.model", golden["facts"]["vocab_size"])


def test_missing_file_is_a_tokenizer_error(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"absent\.model"):
        Tokenizer.load(tmp_path / "absent.model", None)


def test_directory_is_a_tokenizer_error(tmp_path: Path):
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path, None)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 64, b"\xff" * 64])
def test_garbage_is_a_tokenizer_error(tmp_path: Path, content: bytes):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError):
        Tokenizer.load(path, None)


@pytest.mark.parametrize("num_bytes_kept", [1, 17, 200, 1000, -1])
def test_truncated_file_is_a_tokenizer_error(tmp_path: Path, small_file: Path, num_bytes_kept: int):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_file.read_bytes()[:num_bytes_kept])
    with pytest.raises(TokenizerError):
        Tokenizer.load(path, 400)


def test_other_vocabulary_size_is_refused_with_both_numbers(small_file: Path):
    with pytest.raises(TokenizerError, match=r"400 pieces.*131072"):
        Tokenizer.load(small_file, 131072)


def test_vocabulary_size_is_the_number_of_pieces(small_file: Path):
    assert Tokenizer.load(small_file, 400).vocab_size == 400


def test_tokenizer_that_removes_whitespace_is_refused(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_small_tokenizer(remove_extra_whitespaces=True, user_defined_symbols=[]))
    with pytest.raises(TokenizerError, match="whitespace"):
        Tokenizer.load(path, None)


def test_tokenizer_without_dummy_prefix_keeps_the_first_space(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_small_tokenizer(add_dummy_prefix=False))
    tokenizer = Tokenizer.load(path, None)
    token_ids = tokenizer.encode(" mill")
    assert tokenizer.decode(token_ids) == join_pieces(tokenizer, [], token_ids) == " mill"


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip_without_control_ids(tokenizer: Tokenizer, text: str):
    token_ids = tokenizer.encode(text)
    assert not {PAD, BOS, EOS} & set(token_ids)
    assert tokenizer.decode(token_ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ud83d \ude00"])
def test_lone_surrogate_is_an_invalid_request(tokenizer: Tokenizer, text: str):
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode(text)


@pytest.mark.parametrize("beyond", [0, 1, 2**31, 2**64])
def test_id_beyond_the_vocabulary_is_an_invalid_request_naming_id_and_limit(
    tokenizer: Tokenizer, beyond: int
):
    token_id = tokenizer.vocab_size + beyond
    for use in (lambda: tokenizer.decode([5, token_id]), lambda: tokenizer.text_of(token_id)):
        with pytest.raises(InvalidRequestError, match=str(tokenizer.vocab_size - 1)) as caught:
            use()
        assert caught.value.value == token_id


def test_negative_id_is_an_invalid_request(tokenizer: Tokenizer):
    with pytest.raises(InvalidRequestError):
        tokenizer.decode([-1])


def test_control_ids_have_no_text_and_the_unknown_id_has(tokenizer: Tokenizer):
    assert tokenizer.decode([PAD, BOS, EOS]) == ""
    assert tokenizer.decode([BOS, *tokenizer.encode("mill"), EOS]) == "mill"
    assert tokenizer.decode([UNK]) == tokenizer.text_of(UNK) != ""


def test_names_distinguish_tokens_with_equal_text(tokenizer: Tokenizer):
    assert tokenizer.decode([EOS]) == tokenizer.decode([BOS]) == ""
    assert tokenizer.name_of(EOS) != tokenizer.name_of(BOS)
    spaced = tokenizer.encode("mill")[0]
    assert tokenizer.decode([spaced]) == tokenizer.name_of(spaced).removeprefix(" ")
    assert tokenizer.name_of(spaced).startswith(" ")
    byte_ids = [i for i in range(400) if tokenizer.byte_of(i) is not None]
    assert {tokenizer.name_of(i) for i in byte_ids} == {f"bytes:\\x{b:02x}" for b in range(256)}


def test_grok_1_strings_encode_and_decode_as_recorded(grok_1: Tokenizer, golden: dict[str, Any]):
    assert golden["strings"]
    for entry in golden["strings"]:
        assert grok_1.encode(entry["text"]) == entry["ids"]
        assert grok_1.decode(entry["ids"]) == entry["decoded"]


def test_grok_1_single_ids_decode_as_recorded(grok_1: Tokenizer, golden: dict[str, Any]):
    for entry in golden["single_ids"]:
        token_id = entry["id"]
        assert grok_1.decode([token_id]) == entry["decoded"]
        assert (grok_1.byte_of(token_id) is not None) == (entry["type"] == "byte")


def test_grok_1_prefixes_decode_as_recorded(grok_1: Tokenizer, golden: dict[str, Any]):
    for entry in golden["prefix_decoding"]:
        token_ids = grok_1.encode(entry["text"])
        prefixes = [grok_1.decode(token_ids[: k + 1]) for k in range(len(token_ids))]
        assert prefixes == entry["prefix_decodes"]


def test_grok_1_special_ids_are_as_recorded(grok_1: Tokenizer, golden: dict[str, Any]):
    facts = golden["facts"]
    assert [facts[f"{name}_id"] for name in ("pad", "bos", "eos", "unk")] == [PAD, BOS, EOS, UNK]
    first, last = facts["byte_ids"]
    assert [grok_1.byte_of(token_id) for token_id in range(first, last + 1)] == list(range(256))
    for token_id, piece in facts["user_defined"]:
        assert grok_1.text_of(token_id) == piece.replace("▁", " ")
        # Spaces are escaped before pieces are matched, so the literal runs of spaces never match.
        if " " not in piece:
            assert token_id in grok_1.encode(piece)


def test_grok_1_pieces_are_as_recorded(golden: dict[str, Any]):
    processor = SentencePieceProcessor(model_file=str(GROK_1_DIR / "tokenizer.model"))
    for entry in golden["single_ids"]:
        assert processor.id_to_piece(entry["id"]) == entry["piece"]
    for entry in golden["strings"]:
        if entry["pieces"] is not None:
            assert processor.encode(entry["text"], out_type=str) == entry["pieces"]
    num_control = sum(map(processor.is_control, range(processor.vocab_size())))
    num_bytes = sum(map(processor.is_byte, range(processor.vocab_size())))
    counts = golden["facts"]["type_counts"]
    assert (num_control, num_bytes) == (counts["control"], counts["byte"])


def stream(tokenizer: Tokenizer, prompt_ids: list[int], completion_ids: list[int]) -> list[str]:
    """The text of each push, then the text of the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
    return [*map(detokenizer.push, completion_ids), detokenizer.flush()]


def join_pieces(tokenizer: Tokenizer, prompt_ids: list[int], completion_ids: list[int]) -> str:
    return "".join(stream(tokenizer, prompt_ids, completion_ids))


def byte_ids(tokenizer: Tokenizer, content: bytes) -> list[int]:
    first = next(i for i in range(tokenizer.vocab_size) if tokenizer.byte_of(i) == 0)
    return [first + byte for byte in content]


def token_id_lists(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds; those below 350 hold the control, user-defined and byte pieces."""
    near = st.integers(0, 350)
    return st.lists(st.one_of(near, near, st.integers(0, vocab_size - 1)), max_size=24)


def unfinished_size(tokenizer: Tokenizer, token_ids: list[int]) -> int:
    """How many bytes at the end begin a character, found in a list of all such beginnings."""
    content = b""
    for token_id in reversed(token_ids):
        byte = tokenizer.byte_of(token_id)
        if byte is None:
            break
        content = bytes([byte]) + content
    for size in (3, 2, 1):
        tail = content[-size:]
        if len(tail) == size and tail in UNFINISHED:
            return size
    return 0


UNFINISHED = {
    character.encode()[:size]
    for character in map(chr, [*range(0x80, 0xD800), *range(0xE000, 0x110000, 64)])
    for size in range(1, len(character.encode()))
}


def test_prompt_that_ends_in_half_a_surrogate_owns_it(
    tokenizer: Tokenizer, processor: SentencePieceProcessor
):
    prompt_ids = byte_ids(tokenizer, b"\xed\xa0")
    assert processor.decode(prompt_ids) == "\ufffd\ufffd"
    assert join_pieces(tokenizer, prompt_ids, []) == ""
    assert join_pieces(tokenizer, prompt_ids, byte_ids(tokenizer, b"\x80")) == "\ufffd"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_end_of_a_prompt_is_enough(tokenizer: Tokenizer, data: st.DataObject):
    prompt_ids = data.draw(token_id_lists(tokenizer.vocab_size))
    whole = IncrementalDetokenizer(tokenizer, ())
    for token_id in prompt_ids:
        whole.push(token_id)
    for end in (IncrementalDetokenizer(tokenizer, prompt_ids), whole.copy()):
        assert (end._unfinished, end._is_first) == (whole._unfinished, whole._is_first)


def test_work_for_a_prompt_depends_on_neither_its_length_nor_the_number_of_samples(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    looked_at: list[int] = []
    byte_of = Tokenizer.byte_of

    def counted(self: Tokenizer, token_id: int) -> int | None:
        looked_at.append(token_id)
        return byte_of(self, token_id)

    monkeypatch.setattr(Tokenizer, "byte_of", counted)
    prompt_ids = (*tokenizer.encode("the end") * 1000, *byte_ids(tokenizer, "中".encode()[:2]))
    looked_at.clear()
    request = GenerationRequest(prompt_ids=tuple(prompt_ids), max_tokens=1, num_samples=64)
    config = replace(GROK_1, sequence_len=len(prompt_ids))
    routed = RoutedRequest(request_id="", request=request, timeout_s=1.0)
    sequences = make_sequences(
        routed, config, lambda each: IncrementalDetokenizer(tokenizer, each.prompt_ids)
    )
    assert len(sequences) == 64
    assert len(looked_at) <= 4


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(
    tokenizer: Tokenizer, processor: SentencePieceProcessor, data: st.DataObject
):
    prompt_ids = data.draw(token_id_lists(tokenizer.vocab_size))
    completion_ids = data.draw(token_id_lists(tokenizer.vocab_size))
    whole = processor.decode(prompt_ids + completion_ids)
    prompt_text = processor.decode(prompt_ids)
    num_owned = len(prompt_text) - unfinished_size(tokenizer, prompt_ids)
    assert prompt_text[:num_owned] + join_pieces(tokenizer, prompt_ids, completion_ids) == whole


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_bytes_of_any_kind_join_to_the_whole_text(
    tokenizer: Tokenizer, processor: SentencePieceProcessor, data: st.DataObject
):
    awkward = st.sampled_from(list(b"A \x80\x82\xa0\xac\xbf\xc0\xc3\xe0\xe2\xed\xef\xf0\xf4\xf5"))
    content = bytes(data.draw(st.lists(st.one_of(awkward, st.integers(0, 255)), max_size=12)))
    token_ids = byte_ids(tokenizer, content)
    assert join_pieces(tokenizer, [], token_ids) == processor.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_new_detokenizer_continues_after_the_delivered_tokens(
    tokenizer: Tokenizer, data: st.DataObject
):
    prompt_ids = data.draw(token_id_lists(tokenizer.vocab_size))
    completion_ids = data.draw(token_id_lists(tokenizer.vocab_size))
    cut = data.draw(st.integers(0, len(completion_ids)))
    undisturbed = stream(tokenizer, prompt_ids, completion_ids)
    resumed = stream(tokenizer, prompt_ids + completion_ids[:cut], completion_ids[cut:])
    assert resumed == undisturbed[cut:]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\ufffd")))
@example(text="😀")
@example(text="größer 漢字 👩‍🚀")
def test_text_streams_without_a_replacement_character(tokenizer: Tokenizer, text: str):
    pieces = stream(tokenizer, [], tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_character_appears_with_its_last_byte(tokenizer: Tokenizer):
    assert stream(tokenizer, [], byte_ids(tokenizer, "€".encode())) == ["", "", "€", ""]


def test_completion_owns_the_character_that_the_prompt_began(tokenizer: Tokenizer):
    first, *rest = byte_ids(tokenizer, "€".encode())
    assert stream(tokenizer, [first], rest) == ["", "€", ""]
    assert stream(tokenizer, [first], [BOS]) == ["\ufffd", ""]
    assert stream(tokenizer, [first], []) == ["\ufffd"]


def test_completion_keeps_its_leading_space_after_a_prompt(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("the")
    assert tokenizer.text_of(token_ids[0]).startswith(" ")
    assert join_pieces(tokenizer, token_ids, token_ids) == " the"


def test_completion_of_a_prompt_without_text_loses_its_leading_space(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("the")
    assert join_pieces(tokenizer, [], token_ids) == "the"
    assert join_pieces(tokenizer, [BOS, PAD], token_ids) == "the"


def test_only_one_leading_space_is_lost(tokenizer: Tokenizer):
    (mark_id,) = {i for i in range(tokenizer.vocab_size) if is_space_mark(tokenizer, i)}
    assert stream(tokenizer, [], [mark_id, mark_id]) == ["", " ", ""]
    assert stream(tokenizer, [mark_id, BOS], [mark_id]) == [" ", ""]


def is_space_mark(tokenizer: Tokenizer, token_id: int) -> bool:
    return tokenizer.byte_of(token_id) is None and tokenizer.text_of(token_id) == " "


def test_id_outside_the_vocabulary_does_not_change_the_stream(tokenizer: Tokenizer):
    first, *rest = byte_ids(tokenizer, "€".encode())
    detokenizer = IncrementalDetokenizer(tokenizer, [first])
    with pytest.raises(InvalidRequestError):
        detokenizer.push(tokenizer.vocab_size)
    assert "".join(map(detokenizer.push, rest)) == "€"
