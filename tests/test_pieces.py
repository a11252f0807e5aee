"""Which tokens are trained: those that hold a character of a trained piece, whatever the tokenizer.

Proved against the tokenizer's own map from characters to tokens, on tokenizers that merge over the
border, that trim their offsets, that add BOS, EOS or both, and on real ones where they are; against
transformers' loss for a text with several trained pieces; and for the official collator's quirks,
each by hand. About 15 s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedsim import weights
from fedsim.data import pieces, tokens
from fedsim.data.pieces import Piece
from fedsim.data.tokens import TokenStore, training_text
from fedsim.domains import PROMPT, RESPONSE_MARK
from fedsim.errors import ModelError
from fedsim.evaluate import choices
from fedsim.evaluate.generation import Request
from fedsim.evaluate.writing import tokenise
from tests.lab import CLIENTS, GRADIENT, Lab, worst
from tests.real import real
from tests.stock import Stock

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ANSWERS = (
    "positive", "neutral", "7", "(a)", "", " two spaces", "\nnext line", "«成長» 🚀", "a\r\nb",
    "it says ### Response: and goes on", "one\n### Response: two", "x" * 40,
)  # fmt: skip
ASKED = ("Up or down?", "Repeat:\n### Response: hello\nand answer.", "word " * 30, "")


def merging() -> PreTrainedTokenizerFast:
    """No pre-tokenizer, as SentencePiece in Llama and Gemma: "e:▁ne" may be one token."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    texts = [pieces.whole(training_text("Up or down?", word))[-22:]
             for word in ("neutral", "negative", "positive") for _ in range(9)]  # fmt: skip
    letters = sorted({c for t in (PROMPT, *ANSWERS, *ASKED) for c in t} - {"\n"})
    raw.train_from_iterator(
        [*texts, *letters],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<unk>"], max_token_length=9,
                            show_progress=False),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")


def check(tokenizer: Any) -> None:
    """Trained is, by the tokenizer's own map, every token from the answer's first character on."""
    bos, eos = pieces.before(tokenizer), tokenizer.eos_token_id
    texts = [training_text(asked, answer) for asked in ASKED for answer in ANSWERS]
    for end, more in ((eos, [eos]), (None, [])):
        for text, (ids, mask) in zip(texts, pieces.label(tokenizer, texts, eos=end), strict=True):
            plain = tokenizer(pieces.whole(text), add_special_tokens=False)
            assert ids == [*bos, *plain["input_ids"], *more]
            first = len(bos) + plain.char_to_token(len(text[0][0]))
            assert np.array_equal(mask, np.arange(len(ids)) >= first), text[-1]


def test_labels_by_characters(tokenizer: Any) -> None:
    check(tokenizer)


@pytest.mark.parametrize("name", ["smollm2", "gemma", "qwen"])
def test_labels_of_real_tokenizers(name: str) -> None:
    found = weights.tokenizer(real(name))
    check(found)
    texts = [training_text("Up or down?", a) for a in ("positive", "neutral", "7")]
    for (ids, mask), answer in zip(pieces.label(found, texts), ("positive", "neutral", "7"),
                                   strict=True):  # fmt: skip
        assert found.decode(np.array(ids)[mask]).strip() == answer
        assert found.decode(np.array(ids)[~mask], skip_special_tokens=True).endswith(RESPONSE_MARK)
    prompts = [text[0][0] for text in texts]
    assert [ids for ids, _ in pieces.read(found, prompts)] == found(prompts)["input_ids"]


def test_a_token_over_the_border_is_trained() -> None:
    merges = merging()
    texts = [training_text("Up or down?", a) for a in ("neutral", "negative", "positive")]
    found = pieces.label(merges, texts, eos=0)
    firsts = [merges.convert_ids_to_tokens(ids)[mask.argmax()] for ids, mask in found]
    assert any(":" in t and "▁" in t for t in firsts), firsts  # such a token there is
    check(merges)
    # From trained to untrained it is trained as well: no character of an answer is left out.
    back = [("Up or down? e:", True), (" neutral", False)]
    ((_, mask),) = pieces.label(merges, [back])
    border = [i for i, (a, b) in enumerate(pieces.read(merges, [pieces.whole(back)])[0][1])
              if a < 14 < b]  # fmt: skip
    assert len(border) == 1 and mask[border[0]] and not mask[border[0] + 1 :].any()


def test_spaces_that_the_tokenizer_trims_off_its_offsets(tokenizer: Any) -> None:
    """As RoBERTa's and GPT-NeoX's: a space alone is reported as nothing."""
    trims = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<eos>"
    )
    trims.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    texts = [training_text(asked, answer) for asked in ASKED for answer in ("7", "", "成 x", "  y")]
    assert any(a == b for _, offsets in pieces.read(trims, [pieces.whole(t) for t in texts])
               for a, b in offsets)  # fmt: skip
    for (ids, mask), (same, wanted) in zip(
        pieces.label(trims, texts), pieces.label(tokenizer, texts), strict=True
    ):
        assert ids == same and np.array_equal(mask, wanted)


TURNS: list[Piece] = [
    ("User: up?\nBot:", False), (" yes<eos>", True), ("\nUser: why?\nBot:", False),
    (" it rose<eos>", True), ("\nUser: thanks", False),
]  # fmt: skip


def test_several_turns(tokenizer: Any) -> None:
    ((ids, mask),) = pieces.label(tokenizer, [TURNS], eos=0)
    found, trained, at = tokenizer(pieces.whole(TURNS)), set(), 0
    for text, on in TURNS:
        trained |= {found.char_to_token(at + c) for c in range(len(text) * on)}
        at += len(text)
    assert set(np.flatnonzero(mask)) == trained and ids[:-1] == found["input_ids"]
    assert ids[-1] == 0 and not mask[-1]  # the end of a text whose last piece is not trained
    ends = np.flatnonzero(np.diff(mask, append=False) & mask)
    assert [ids[i] for i in ends] == [0, 0]  # each answer's own EOS, once
    ((ids, mask),) = pieces.label(tokenizer, [TURNS[:4]], eos=0)
    assert ids[-2:].count(0) == 1 and mask[-1]


def test_the_store_of_several_turns(tokenizer: Any) -> None:
    texts = [TURNS, [("a", False), (" b", True)], [("nothing", False)], TURNS[:4]]
    store = tokens.build(texts, tokenizer, protocol="fedsim", max_length=512, digest="turns")
    for i, (ids, mask) in enumerate(pieces.label(tokenizer, texts, eos=0)):
        assert store.of(i).tolist() == ids
        got = np.zeros(len(ids), dtype=bool)
        for first, end in store.spans(i):
            got[first:end] = True
        assert np.array_equal(got, mask) and store.labels[i] == mask.sum()
        assert store.first[i] == (mask.argmax() if mask.any() else len(ids))
    assert [len(store.spans(i)) for i in range(4)] == [2, 1, 0, 2] and store.unlabelled == 1


def test_the_first_token_is_never_trained(tokenizer: Any) -> None:
    ((_, mask),) = pieces.label(tokenizer, [[("all of it", True)]])
    assert not mask[0] and mask[1:].all()


@pytest.mark.parametrize("train", [{}, {"mode": "strict", "chunk_tokens": 64, "tile": 16}])
def test_gradients_of_several_trained_pieces(
    lab: Callable[..., Lab], train: dict[str, Any]
) -> None:
    """Holes in the labels: loss and gradients are those of stock PEFT, prefixes shared or not."""
    one = lab()
    rng, trained = np.random.default_rng(1), one.store.trained.copy()
    for e in range(len(one.store)):
        a, b = one.store.offsets[e : e + 2]
        begin = a + one.store.first[e] // 2 + 1
        trained[begin:b] ^= rng.random(b - begin) < 0.4
    one = replace(one, store=replace(one.store, trained=trained))
    assert max(len(one.store.spans(e)) for e in range(len(one.store))) > 2
    stock = [Stock(one, c) for c in range(CLIENTS)]
    want = torch.stack([each.backward(0) for each in stock])
    for share in (True, False):
        loss, got = one.gradients(range(CLIENTS), shared_prefix=share, **train)
        assert worst(one.base.layout, got, want) <= GRADIENT
        for c in range(CLIENTS):
            assert abs(loss[c] - stock[c].loss) <= GRADIENT * stock[c].loss


# ----------------------------------------------------------------------------------- EOS and BOS

ADDED = {
    "nothing": "$A", "bos": "<bos> $A", "eos": "$A <eos>", "both": "<bos> $A <eos>",
    "another": "<bos> $A <sep>", "eos first": "<eos> $A", "twice": "<bos> $A <sep> <eos>",
}  # fmt: skip


def adding(tokenizer: Any, single: str) -> Any:
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.add_special_tokens(["<bos>", "<sep>"])
    known = [(t, raw.token_to_id(t)) for t in ("<bos>", "<eos>", "<sep>")]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("kind", [*ADDED, "attributes"])
def test_each_once_whatever_the_tokenizer_adds(tokenizer: Any, kind: str) -> None:
    if kind == "attributes":
        found = adding(tokenizer, "$A")
        found.add_bos_token = found.add_eos_token = True
        assert found("a")["input_ids"][0] == found.bos_token_id
        assert found("a")["input_ids"][-1] == 0
    else:
        found = adding(tokenizer, ADDED[kind])
    first = {"<bos>": [found.bos_token_id], "<eos>": [0]}.get(
        ADDED.get(kind, "<bos>").split()[0], []
    )
    plain = tokenizer("Up or down?")["input_ids"]

    def prompts(*texts: str) -> list[list[int]]:
        return tokenise(found, [Request(text, 0, 1) for text in texts])

    assert prompts("Up or down?") == [[*first, *plain]]
    texts = [training_text("Up or down?", answer) for answer in ("down", "down<eos>")]
    body = tokenizer(pieces.whole(texts[0]))["input_ids"]
    for max_length in (512, len(first) + len(body) + 1):
        store = tokens.build(texts, found, protocol="fedsim", max_length=max_length, digest=kind)
        for i in range(2):  # also where the answer brings its own
            assert store.of(i).tolist() == [*first, *body, 0]
            assert store.spans(i)[0][1] == len(store.of(i)) and not store.cut.any()
            assert store.labels[i] == tokens.own(tokenizer, texts[:1], 512)[0].trained.sum()
    cut = tokens.build(texts, found, protocol="fedsim", max_length=len(first) + len(body),
                       digest=kind)  # fmt: skip
    assert cut.of(0).tolist() == [*first, *body] and cut.cut.all()
    asked = choices.question(found, "Up or down?", ["down", "it rose"])
    for row, start, choice in zip(asked.choices, asked.start, ("down", "it rose"), strict=True):
        assert row.tolist() == [*first, *tokenizer(f"Up or down? {choice}")["input_ids"]]
        assert tokenizer.decode(row[start:]) == f" {choice}"
    if first == [found.bos_token_id]:  # a prompt that brings its own
        assert prompts("<bos>Up or down?") == [[*first, *plain]]


def test_the_key_of_a_store_knows_what_ends_a_text(tokenizer: Any) -> None:
    raw, texts = adding(tokenizer, "$A").backend_tokenizer, [training_text("Up?", "down")]
    last = []
    for eos in ("<eos>", "<sep>"):
        found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos)
        store = tokens.build(texts, found, protocol="fedsim", max_length=99, digest="eos")
        last.append(int(store.of(0)[-1]) == found.eos_token_id)
    assert last == [True, True]


def test_a_tokenizer_without_characters_is_refused(tokenizer: Any) -> None:
    class Slow:
        name_or_path, is_fast = "org/slow", False

    with pytest.raises(ModelError, match=r"tokenizer 'org/slow': got 'Slow'; expected a fast"):
        pieces.read(Slow(), ["a"])


# ---------------------------------------------------------------- what the official collator does


def official(tokenizer: Any, answer: str, max_length: int = 512, asked: str = "Up?") -> TokenStore:
    return tokens.build([training_text(asked, answer)], tokenizer, protocol="flowertune",
                        max_length=max_length, digest=f"{asked}/{answer}")  # fmt: skip


def trained(tokenizer: Any, store: TokenStore) -> str:
    return tokenizer.decode(store.of(0)[store.trained], skip_special_tokens=False)


def test_a_quoted_mark_loses_what_precedes_it(tokenizer: Any) -> None:
    quoting = "first\n### Response: second"
    assert trained(tokenizer, official(tokenizer, quoting)) == " second"
    own = tokens.build([training_text("Up?", quoting)], tokenizer, protocol="fedsim",
                       max_length=512, digest="quote")  # fmt: skip
    assert trained(tokenizer, own) == f" {quoting}<eos>"


def test_a_mark_that_is_cut_off_leaves_no_labels_or_those_of_an_earlier_one(tokenizer: Any) -> None:
    n = len(tokenizer(PROMPT.format(instruction="Up?"))["input_ids"])
    lost = official(tokenizer, "yes", n - 1)
    assert lost.unlabelled == 1 and lost.cut.all() and not lost.unmarked.any()
    asked = "Repeat:\n### Response: hello and on and on"
    n = len(tokenizer(PROMPT.format(instruction=asked))["input_ids"])
    earlier = trained(tokenizer, official(tokenizer, "yes", n - 4, asked))
    assert earlier.startswith(" hello and on")


def test_eos_is_masked_wherever_it_is(tokenizer: Any) -> None:
    ends = adding(tokenizer, "$A <eos>")
    store = official(ends, "one<eos>two")
    assert store.of(0)[-1] == 0 and trained(ends, store) == " onetwo"
    assert len(store.spans(0)) == 2
    other = adding(tokenizer, "$A <sep>")  # is no padding there, and so is trained
    assert trained(other, official(other, "one")) == " one<sep>"


def test_texts_are_cut_as_the_tokenizer_cuts_them(tokenizer: Any) -> None:
    """What it adds behind a text has its place: the text loses one token more."""
    ends = adding(tokenizer, "<bos> $A <eos>")
    text = pieces.whole(training_text("Up?", "a long answer of many words"))
    n = len(ends(text)["input_ids"]) - 3
    store = official(ends, "a long answer of many words", n)
    assert store.of(0).tolist() == ends(text, truncation=True, max_length=n)["input_ids"]
    assert store.cut.tolist() == [True] and store.of(0)[-1] == 0


def test_a_mark_that_is_merged_is_not_found() -> None:
    store = official(merging(), "neutral")
    assert store.unmarked.all() and store.unlabelled == 1 and not store.cut.any()
