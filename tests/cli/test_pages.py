"""The pages in a browser: no console error, no request; clicks and keys do what they should; texts stay text."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import torch

from browser import CHROMIUM, browser
from minillama.cli.pages import FORBIDDEN, render
from minillama.cli.xray_page import Subject, Text, page
from minillama.decoding.filters import distribution, filters_by_name
from minillama.decoding.xray import logit_lens, shares, trace
from models import random_ids, tiny_llama

NASTY = "</script><b>&\"'\x00\x1b\ud800\u2028"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Words:
    """A tokenizer whose tokens are these texts."""

    stop_ids, bos_id, unused_ids = (1, 2), 1, ()

    def __init__(self, size=64):
        self.words = [f" w{i}" for i in range(size)]
        self.words[5] = NASTY

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    def encode(self, text, bos, eos):
        return [3]


def subject(model, tokens, name="model.pt"):
    return Subject(name, "2 layers", trace(model, tokens))


def xray_page(tokens=None, against=None, settings=None, prompt=6, **changes):
    model = tiny_llama(**({"norm": "rmsnorm", "causal": True, "max_seq_len": 128} | changes))
    tokens = random_ids(1, 10)[0].tolist() if tokens is None else tokens
    first = subject(model, tokens)
    answers = [*tokens[1:], int(first.trace.logits[-1].argmax())]
    other = None if against is None else subject(against, tokens, "other.pt")
    return page(first, Text(Words(), min(prompt, len(tokens)), answers, settings=settings or {}), other), first, answers


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def opened(tab, tmp_path):
    def open_page(content, **how):
        path = tmp_path / "page.html"
        path.write_text(content, encoding="utf-8")
        tab.problems.clear()
        return tab.open(path.as_uri(), **how)

    yield open_page
    assert tab.problems == [] and len(tab.requests) == 1, "no console error, and no request but for the page"


def rows(tab, selector):
    """The texts of a table's cells."""
    script = f"[...document.querySelectorAll({json.dumps(selector + ' tr')})]"
    return tab.run(f"{script}.map((row) => [...row.cells].map((cell) => cell.textContent))")


def numbers(text):
    return [float(one.replace("−", "-")) for one in re.findall(r"[-−]?\d+\.\d+", text)]


def test_a_page_allows_its_own_script_and_nothing_else():
    content, *_ = xray_page()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert set(re.findall(r"\w+://[^\"]*", content)) == {"http://www.w3.org/2000/svg"}, "no address of anything else"


def test_no_text_ends_the_script_or_holds_what_html_forbids():
    content, *_ = xray_page([5, 5, 3, 5])
    assert content.count("</script>") == 2 and not FORBIDDEN.search(content)
    assert "&lt;b&gt;" in render(
        "report.html", title="<b>", today="", problems=["\x00"], scores=[], mixtures=[], groups=[]
    )


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_every_screen(opened, width, scheme):
    tab = opened(
        xray_page(against=tiny_llama(1, norm="rmsnorm", causal=True, max_seq_len=128))[0], width=width, scheme=scheme
    )
    assert tab.run("document.documentElement.scrollWidth") <= width
    dark = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")


@in_browser
def test_hostile_tokens_are_shown_as_text(opened):
    tab = opened(xray_page([5, 5, 3, 5])[0])
    shown = "</script><b>&\"'<0x00><0x1B><0xD800><0x2028>"
    assert tab.run("document.querySelectorAll('#tokens button').length") == 4
    assert tab.text("#tokens button") == shown and tab.run("document.querySelectorAll('b.x').length") == 0


@in_browser
def test_clicks_and_keys_choose_tokens_and_maps(opened):
    tab = opened(xray_page()[0])
    assert "token 6 of 10" in tab.text("#chosen")
    tab.click("#tokens button:nth-child(3)")
    assert "token 3 of 10" in tab.text("#chosen")
    tab.press("ArrowRight")
    tab.press("End")
    tab.press("ArrowLeft")
    assert "token 9 of 10" in tab.text("#chosen")
    assert tab.run("document.activeElement.textContent") == tab.text("#tokens button:nth-child(9)")
    tab.click("#grid [role=row]:nth-child(3) button:nth-of-type(3)")  # below the heads
    assert tab.text("#reads").startswith("In layer 2, head 3,")
    tab.press("ArrowRight")
    tab.press("ArrowUp")
    assert tab.text("#reads").startswith("In layer 1, head 4,")
    tab.click("#map", x=0.25, y=0.75)  # token 8 reads token 3
    assert "token 8 of 10" in tab.text("#chosen") and "turned by their positions" in tab.text("#arithmetic")
    tab.click("#readers button:nth-of-type(2)")
    assert "token 8 of 10" in tab.text("#chosen")


@in_browser
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layernorm", "causal": False},
        {"position_embedding_type": "alibi", "norm": "layernorm"},
        {"sliding_window": 3},
        {"attention_type": "differential"},
        {"n_kv_heads": 4},
    ],
)
def test_the_numbers_on_the_page_are_those_of_the_module(opened, changes):
    content, found, answers = xray_page(**changes)
    tab, traced, t = opened(content), found.trace, 5
    tab.run("choose({ layer: 0, head: 0 })")
    maps = traced.layers[0].maps[0, t]
    assert sorted(numbers(tab.text("#reads")), reverse=True) == pytest.approx(
        sorted(maps.tolist(), reverse=True)[: len(numbers(tab.text("#reads")))], abs=6e-4
    )
    # The arithmetic of a cell ends in the cell.
    marked = next(cells for cells in rows(tab, "#arithmetic > div:last-child") if cells[0] == tab.run("quoted(read())"))
    assert numbers(tab.text("#result"))[0] == pytest.approx(float(maps[tab.run("read()")]), abs=6e-4)
    assert numbers(marked[1])[0] == pytest.approx(float(traced.layers[0].scores[0, t, tab.run("read()")]), abs=2e-3)
    # The lens: its top line is the model's own distribution.
    with torch.no_grad():
        lens = logit_lens(traced, torch.tensor(answers))
    top = rows(tab, "#lens")[1]
    assert [numbers(cell)[0] for cell in top[1:6]] == pytest.approx(lens.probabilities[-1, t].tolist(), abs=6e-3)
    assert top[-1] == str(int(lens.rank[-1, t])) and numbers(top[-2])[0] == pytest.approx(
        float(lens.answer[-1, t]), abs=6e-4
    )
    # The shares and their sum.
    with torch.no_grad():
        part = shares(traced, traced.model.output.weight[answers])
    table = rows(tab, "#shares")
    expected = [float(part.feed_forward[0, t]), *part.heads[0, :, t].tolist()]
    assert [numbers(cell)[0] for cell in table[2][2:]] == pytest.approx(expected, abs=6e-3)
    assert numbers(table[-1][-1])[0] == pytest.approx(float(traced.logits[t, answers[t]]), abs=6e-3)
    tab.click("#lead")
    rival = traced.logits[t].scatter(0, torch.tensor(answers[t]), -torch.inf).max()
    assert numbers(rows(tab, "#shares")[-1][-1])[0] == pytest.approx(
        float(traced.logits[t, answers[t]] - rival), abs=6e-3
    )


FILTERS = [
    {"epsilon": 0.03},
    {"eta": 0.05},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"top_k": 20, "top_p": 0.8, "typical_p": 0.9},
]


@in_browser
def test_the_sliders_cut_as_the_filters_do(opened):
    content, found, _ = xray_page()
    tab = opened(content)
    for chosen in FILTERS:
        for temperature in (0.5, 1.0, 1.7):
            kept = filters_by_name(**{"epsilon": 0.0} | chosen)
            for t in (0, 5, 9):
                expected = distribution(found.trace.logits[t], temperature, kept)
                settings = json.dumps(chosen | {"temperature": temperature})
                got = tab.run(f"candidates({t}, {settings}).map((one) => [one.id, one.after])")
                after = torch.zeros(64)
                after[[i for i, _ in got]] = torch.tensor([p for _, p in got])
                torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5, msg=f"{chosen} {temperature} {t}")


@in_browser
def test_a_slider_and_a_seed_change_the_candidates_at_once(opened):
    tab = opened(xray_page(settings={"temperature": 1.0, "epsilon": 0.02})[0])
    change = "e.value = {}; e.dispatchEvent(new Event('input'))"
    set_value = partial(("(() => {{ const e = document.querySelector('{}'); " + change + " }})()").format)
    before, drawn = tab.text("#counts"), tab.text("#draws")
    tab.run(set_value("#top_k", 2))
    assert tab.text("#counts").startswith("Kept 2, cut 62") and before != tab.text("#counts")
    tab.run(set_value("#top_k", 0))
    assert (tab.text("#counts"), tab.text("#draws")) == (before, drawn)
    tab.run(set_value("#seed", 2))
    assert tab.text("#draws") != drawn
    tab.run(set_value("#temperature", 0))
    assert tab.text("#counts").startswith("Kept 1, cut 63")


@in_browser
def test_a_second_model_is_shown_beside_the_first(opened):
    other = tiny_llama(norm="rmsnorm", causal=True, max_seq_len=128)
    with torch.no_grad():
        other.layers[1].attention.compute_key.weight.mul_(1.5)
    tab = opened(xray_page(against=other)[0])
    assert "layer 2: keys" in tab.text("section:last-of-type p") and "other.pt" in tab.text("section:last-of-type h2")
    assert tab.run("document.querySelectorAll('#lens table, #shares table').length") == 4
    assert "–" not in tab.text("#lens") + tab.text("#shares"), "no number is missing"
    tab.run("choose({ layer: 1, head: 2, view: 'difference' })")
    (model, changed) = (tiny_llama(norm="rmsnorm", causal=True, max_seq_len=128), other)
    tokens = random_ids(1, 10)[0]
    gap = trace(model, tokens).layers[1].maps[2, 5] - trace(changed, tokens).layers[1].maps[2, 5]
    assert tab.run("weight(1, 2, 5, 3)") == pytest.approx(float(gap[3]), abs=1e-5)
    same = xray_page(against=tiny_llama(norm="rmsnorm", causal=True, max_seq_len=128))[0]
    assert "No difference is above 0.1 %" in opened(same).text("section:last-of-type p")


@in_browser
def test_each_token_of_a_classifier_of_the_mean_has_its_own_answer(opened):
    model, tokens = tiny_llama(norm="rmsnorm", causal=True, max_seq_len=128), random_ids(1, 10)[0].tolist()
    one, classes = subject(model, tokens), ["bad", "fair", "good"]
    one.readout = torch.nn.Linear(len(one.trace.hidden[0]), 3)
    one.weight, one.bias = one.readout.weight, one.readout.bias
    own = one.readout(one.trace.hidden).detach().softmax(-1)
    best = int(one.readout(one.trace.hidden).mean(0).argmax())
    t = next(t for t in range(10) if own[t].argmax() != best)
    one.mean = [("bad", 0.5), ("fair", 0.3), ("good", 0.2)]
    tab = opened(page(one, Text(Words(), 10, [best] * 10, classes)))
    assert "from the mean over all tokens: bad 0.500, fair 0.300, good 0.200." in tab.text("#part-5")
    tab.run(f"choose({{ t: {t} }})")
    likeliest, place = classes[int(own[t].argmax())], 1 + int((own[t] > own[t, best]).sum())
    assert tab.text("#first") == (
        f"At this token “{likeliest}” is the likeliest ({own[t].max():.3f}); "
        f"the classifier's answer, “{classes[best]}”, is number {place}."
    )
    assert f"the classifier's answer, “{classes[best]}”, has {own[t, best]:.3f}, number {place}" in tab.text("#chosen")
    assert {len(cells) for cells in rows(tab, "#candidates")} == {3}, "a class, its bar and its probability"


def test_a_page_is_made_smaller_until_it_fits(monkeypatch):
    content, *_ = xray_page()
    monkeypatch.setattr("minillama.cli.xray_page.MOST_BYTES", len(content) - 1)
    assert len(xray_page()[0]) < len(content)
    monkeypatch.setattr("minillama.cli.xray_page.MOST_BYTES", 20_000)
    with pytest.raises(ValueError, match="10 tokens would have 0 MB, more than 0; give a shorter text"):
        xray_page()


@in_browser
def test_with_few_candidates_the_others_count_as_equally_likely(opened, monkeypatch):
    monkeypatch.setattr("minillama.cli.xray_page.WAYS", (("i2", 20),))
    content, found, _ = xray_page()
    tab = opened(content)
    got = tab.run("candidates(5, { temperature: 1, top_k: 3 }).map((one) => [one.n, one.before, one.after])")
    expected = found.trace.logits[5].softmax(-1).sort(descending=True).values
    assert sum(n * before for n, before, _ in got) == pytest.approx(1, abs=1e-3) and sum(n for n, _, _ in got) == 64
    assert sum(before for n, before, _ in got if n == 1) == pytest.approx(float(expected[:20].sum()), abs=1e-3)
    assert sum(after > 0 for *_, after in got) == 3
