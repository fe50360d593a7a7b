"""Textual Inversion: trained rows against a table that contains them, and a tokenizer that is unchanged after detaching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from tests.raising import raises
from veneer.injection import SelectionError, UnsupportedSite, attach, hosts, methods
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.snapshot import assert_same, snapshot

PROMPT = "a photo of <toy> on the beach"
SITE = "text_encoder.embeddings.token_embedding.vocabulary"


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline("sd")


def words(pipe: Any, tokens: Any = "<toy>", **config: Any) -> Any:
    return attach(pipe, "textual_inversion", tokens=tokens, **config)


def rows(tuned: Any) -> nn.Parameter:
    (parameter,) = tuned.parameters()
    return parameter


def stir(tuned: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def encode(pipe: Any, prompt: str, part: str = "") -> Tensor:
    """Ids as diffusers makes them: vectors of one token expanded."""
    tokenizer = getattr(pipe, f"tokenizer{part}")
    text = TextualInversionLoaderMixin._maybe_convert_prompt(pipe, prompt, tokenizer)
    ids: Tensor = tokenizer(text, padding="max_length", max_length=12, return_tensors="pt").input_ids
    return ids


def run(pipe: Any, prompt: str, part: str = "") -> Any:
    with torch.no_grad():
        return getattr(pipe, f"text_encoder{part}")(encode(pipe, prompt, part))


def facts(tokenizer: Any) -> tuple[Any, ...]:
    ids = tokenizer.encode(PROMPT)  # first: the backend remembers the padding of the last call
    backend = tokenizer._tokenizer.to_str()
    return ids, backend, len(tokenizer), sorted(tokenizer.__dict__), dict(tokenizer.added_tokens_encoder)


# v* in the place of a row


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_encoder_reads_the_learned_rows(family: str, vectors: int) -> None:
    """Against an encoder without veneer, with an extended table: CLIP and T5, hidden states and pooled output."""
    pipe = tiny_pipeline(family)
    part = "_3" if family == "sd3" else ""
    tuned = words(pipe, vectors=vectors)
    stir(tuned)
    got = run(pipe, PROMPT, part)
    ids = encode(pipe, PROMPT, part)
    learned = next(p for k, p in tuned.named_parameters() if k.startswith(f"text_encoder{part}."))
    plain = getattr(tiny_pipeline(family), f"text_encoder{part}")
    table = plain.get_input_embeddings()
    assert (ids >= table.num_embeddings).sum() == vectors
    plain.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([table.weight.detach(), learned.detach()])))
    with torch.no_grad():
        want = plain(ids)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    if family == "sd":
        assert torch.equal(got.pooler_output, want.pooler_output)


def test_new_ids_do_not_move_the_pooled_output(pipe: Any) -> None:
    """Older CLIP configurations pool at the largest id, which must stay the end of the text."""
    pipe.text_encoder.config.eos_token_id = 2
    pipe.text_encoder.eos_token_id = 2
    stir(words(pipe))
    output, ids = run(pipe, PROMPT), encode(pipe, PROMPT)
    end = int((ids[0] == pipe.tokenizer.eos_token_id).int().argmax())
    assert int(ids[0].argmax()) != end
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


def test_only_the_rows_are_trained(pipe: Any) -> None:
    """A step changes them and nothing of the model; other prompts stay bitwise."""
    other = run(pipe, "a photo of a duck").last_hidden_state
    tuned = words(pipe, vectors=2, initialize="duck")
    before = {k: p.detach().clone() for k, p in pipe.text_encoder.named_parameters() if "veneer" not in k}
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    pipe.text_encoder(encode(pipe, PROMPT)).last_hidden_state.square().sum().backward()
    assert rows(tuned).grad.abs().amin(dim=1).min() > 0
    assert all(p.grad is None for k, p in pipe.text_encoder.named_parameters() if "veneer" not in k)
    optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in pipe.text_encoder.named_parameters() if k in before)
    assert torch.equal(run(pipe, "a photo of a duck").last_hidden_state, other)


# how the rows begin


@pytest.mark.parametrize("word", ["<toy>", "a <toy>"])
def test_an_initializer_word_without_a_row_is_rejected(pipe: Any, word: str) -> None:
    before = facts(pipe.tokenizer)
    with raises(UnsupportedSite, site=SITE, method="textual_inversion", option="initialize", given="<toy>"):
        words(pipe, initialize=word)
    assert facts(pipe.tokenizer) == before


def test_a_token_starts_as_its_initializer_word(pipe: Any) -> None:
    word = run(pipe, PROMPT.replace("<toy>", "duck")).last_hidden_state
    tuned = words(pipe, initialize="duck")
    assert torch.equal(run(pipe, PROMPT).last_hidden_state, word)
    (index,) = pipe.tokenizer.encode("duck", add_special_tokens=False)
    assert torch.equal(rows(tuned)[0], pipe.text_encoder.get_input_embeddings().weight[index])


def test_strength_interpolates_from_the_initializer_word(pipe: Any) -> None:
    word = run(pipe, PROMPT.replace("<toy>", "duck")).last_hidden_state
    tuned = words(pipe, initialize="duck")
    stir(tuned)
    assert not torch.equal(run(pipe, PROMPT).last_hidden_state, word)
    with tuned.enabled(False):
        assert torch.equal(run(pipe, PROMPT).last_hidden_state, word)
    tuned.scale = 0
    assert torch.equal(run(pipe, PROMPT).last_hidden_state, word)
    table = pipe.text_encoder.get_input_embeddings()
    (index,) = pipe.tokenizer.encode("duck", add_special_tokens=False)
    tuned.scale = 0.5
    seen: list[Tensor] = []
    handle = table.register_forward_hook(lambda _m, _a, output: seen.append(output))
    run(pipe, PROMPT)
    handle.remove()
    place = int((encode(pipe, PROMPT)[0] == pipe.tokenizer.convert_tokens_to_ids("<toy>")).int().argmax())
    torch.testing.assert_close(seen[0][0, place], (table.weight[index] + rows(tuned)[0]) / 2)


def test_an_initializer_word_of_several_tokens(pipe: Any) -> None:
    ids = pipe.tokenizer.encode("xyz", add_special_tokens=False)
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert len(ids) > 1
    torch.testing.assert_close(rows(words(pipe, "<a>", initialize="xyz")), table[ids].mean(0)[None])
    first = words(pipe, "<b>", initialize="xyz", subtokens="first", vectors=2)
    assert torch.equal(rows(first), table[ids[:1]].expand(2, -1))


def test_without_an_initializer_rows_have_the_standard_deviation_of_the_table() -> None:
    def drawn(seed: int) -> tuple[Tensor, float]:
        pipe = tiny_pipeline("sd")
        torch.manual_seed(seed)
        return rows(words(pipe, vectors=200)).detach(), pipe.text_encoder.get_input_embeddings().weight.std().item()

    (first, spread), (again, _), (other, _) = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(spread, rel=0.05)
    assert abs(first.mean().item()) < spread / 10


def test_several_tokens_start_as_separate_words(pipe: Any) -> None:
    tuned = words(pipe, ("<a>", "<b>"), vectors=2, initialize=("duck", ""))
    (index,) = pipe.tokenizer.encode("duck", add_special_tokens=False)
    duck = pipe.text_encoder.get_input_embeddings().weight[index]
    assert torch.equal(rows(tuned)[:2], duck.expand(2, -1))
    assert not torch.equal(rows(tuned)[2], rows(tuned)[3])
    names, size = ["<a>", "<a>_1", "<b>", "<b>_1"], len(pipe.tokenizer)
    assert pipe.tokenizer.convert_tokens_to_ids(names) == list(range(size - 4, size))


# the tokenizer, coming and going


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_detach_leaves_tokenizers_and_encoders_as_they_were(family: str) -> None:
    pipe = tiny_pipeline(family)
    tokenizers = {k: v for k, v in pipe.components.items() if k.startswith("tokenizer")}
    encoders = {k: v for k, v in pipe.components.items() if k.startswith("text_encoder")}
    before = {k: facts(t) for k, t in tokenizers.items()}, {k: snapshot(e) for k, e in encoders.items()}
    tuned = words(pipe, vectors=2)
    assert len(tuned.parts) == len(encoders)
    assert all("<toy>_1" in t.get_vocab() for t in tokenizers.values())
    tuned.detach()
    assert {k: facts(t) for k, t in tokenizers.items()} == before[0]
    for name, encoder in encoders.items():
        assert_same(before[1][name], snapshot(encoder), name)


def test_a_failed_attach_leaves_no_token(pipe: Any) -> None:
    """Failing while attaching, and afterwards, in a forward pass of too many tokens."""
    before, host = facts(pipe.tokenizer), snapshot(pipe.text_encoder)
    with raises(UnsupportedSite, option="tokens", given="<Toy>", expected="lower case"):
        words(pipe, "<Toy>", vectors=2)
    assert facts(pipe.tokenizer) == before
    with pytest.raises(ValueError, match="Sequence length"):
        words(pipe, sample={"text_encoder": {"input_ids": torch.ones(1, 99, dtype=torch.long)}})
    assert facts(pipe.tokenizer) == before
    assert_same(host, snapshot(pipe.text_encoder), "a failed attach")


class Pair:
    """A pipeline whose first text encoder keeps capitals (T5) and whose second does not (CLIP)."""

    def __init__(self) -> None:
        flux = tiny_pipeline("flux")
        self.components = {
            "text_encoder": flux.text_encoder_2, "tokenizer": flux.tokenizer_2,
            "text_encoder_2": flux.text_encoder, "tokenizer_2": flux.tokenizer,
        }  # fmt: skip


def test_a_failure_at_the_second_encoder_undoes_the_first() -> None:
    pair = Pair()
    tokenizers = pair.components["tokenizer"], pair.components["tokenizer_2"]
    words(pair, "<Toy>", vectors=2, where="text/vocabulary").detach()
    before = [facts(t) for t in tokenizers]
    with raises(
        UnsupportedSite, site="text_encoder_2.embeddings.token_embedding.vocabulary", option="tokens", expected="lower case"
    ):
        words(pair, "<Toy>", vectors=2)
    assert [facts(t) for t in tokenizers] == before


@pytest.mark.parametrize("first", [0, 1])
def test_tokens_are_added_and_removed_in_any_order(pipe: Any, first: int) -> None:
    """The ids and the outputs of those that stay do not move."""
    before = facts(pipe.tokenizer)
    both = [words(pipe, token, vectors=2, name=token[1:-1]) for token in ("<a>", "<b>")]
    for tuned in both:
        stir(tuned)
    prompts = ["a photo of <a>", "a photo of <b>"]
    stays = prompts[1 - first]
    ids, output = encode(pipe, stays), run(pipe, stays).last_hidden_state
    both[first].detach()
    assert torch.equal(encode(pipe, stays), ids)
    assert torch.equal(run(pipe, stays).last_hidden_state, output)
    assert ("<a>", "<b>")[first] not in pipe.tokenizer.get_vocab()
    both[1 - first].detach()
    assert facts(pipe.tokenizer) == before


def test_encoders_with_one_tokenizer_share_the_token() -> None:
    pipe = tiny_pipeline("sdxl")
    pipe.tokenizer_2 = pipe.tokenizer
    before = facts(pipe.tokenizer)
    tuned = words(pipe)
    assert len(pipe.tokenizer) == before[2] + 1
    assert len({int(a.new_ids) for _, a in tuned.parts.values()}) == 1
    tuned.detach()
    assert facts(pipe.tokenizer) == before


@pytest.mark.parametrize(
    ("token", "vectors", "taken"),
    [
        ("duck", 1, "duck</w>"),
        ("<taken>", 1, "<taken>"),
        ("<free>", 2, "<free>_1"),
        ("<taken>_1", 1, "<taken>"),
        ("two words", 1, None),
        ("", 1, None),
    ],
)
def test_tokens_that_cannot_be_new(pipe: Any, token: str, vectors: int, taken: str | None) -> None:
    pipe.tokenizer.add_tokens(["<taken>", "<free>_1"])
    before = facts(pipe.tokenizer)
    with raises(UnsupportedSite, site=SITE, option="tokens", given=token, where=taken):
        words(pipe, token, vectors=vectors)
    assert facts(pipe.tokenizer) == before


# without a tokenizer, and the rest of the contract


def test_a_bare_encoder_takes_ids() -> None:
    host = hosts.get("clip_text")()
    model = host.tiny()["clip"]()
    with raises(UnsupportedSite, option="ids", given=(), expected="tokenizer"):
        attach(model, "textual_inversion")
    tuned = attach(model, "textual_inversion", vectors=2, ids=(7, 900))
    stir(tuned)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([[62, 900, 5, 7, 63]]))
    assert torch.equal(seen[0][0, 1], rows(tuned)[1])
    assert torch.equal(seen[0][0, 3], rows(tuned)[0])
    assert torch.equal(seen[0][0, 2], model.get_input_embeddings().weight[5])


def test_ids_are_the_tokenizers_where_there_is_one(pipe: Any) -> None:
    with raises(UnsupportedSite, option="ids", given=(400,)):
        words(pipe, ids=(400,))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_every_row_of_every_encoder_is_live(family: str) -> None:
    pipe = tiny_pipeline(family)
    tuned = words(pipe, ("<a>", "<b>"), vectors=5)
    tuned.probe()
    tuned.probe({k: {"input_ids": torch.ones(1, 9, dtype=torch.long)} for k in tuned.towers})
    counts = [tuned.method.count(site) for site, _ in tuned.parts.values()]
    widths = [e.get_input_embeddings().embedding_dim for k, e in pipe.components.items() if k.startswith("text_encoder")]
    assert counts == [10 * w for w in widths]
    assert sum(p.numel() for p in tuned.parameters()) == sum(counts)


def test_one_encoder_of_two() -> None:
    tuned = words(tiny_pipeline("sdxl"), where="text_2/vocabulary")
    assert [site.component for site, _ in tuned.parts.values()] == ["text_encoder_2"]
    with raises(SelectionError, pattern="text_3/vocabulary", given=()):
        words(tiny_pipeline("sdxl"), where="text_3/vocabulary")


@pytest.mark.parametrize(
    ("config", "option", "given"),
    [
        ({"vectors": 0}, "vectors", 0),
        ({"tokens": ()}, "tokens", ()),
        ({"tokens": ("<a>", "<a>")}, "tokens", ("<a>", "<a>")),
        ({"tokens": ("<a>", "<b>"), "initialize": ("duck",)}, "initialize", 1),
        ({"subtokens": "last"}, "subtokens", "last"),
        ({"vectors": 2, "ids": (1,)}, "ids", (1,)),
        ({"vectors": 2, "ids": (1, 1)}, "ids", (1, 1)),
    ],
)
def test_options_that_make_no_sense(config: dict[str, Any], option: str, given: Any) -> None:
    with raises(OptionError, method="textual_inversion", option=option, given=given):
        methods.get("textual_inversion").from_config(config)
