"use strict";
// The page of --option serve. `story` holds the tokens: {id, text, top}, those of the beginning without `top`.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
let story = [], given = 0, reader = null, chosen = -1;

function make(tag, attributes, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}
async function ask(path, body, signal) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" } });
  if (answer.ok) return answer;
  throw new Error((await answer.json()).error.message);
}
function show() {
  $("story").replaceChildren(...story.map((token, i) => token.top
    ? make("button", { type: "button", className: i === chosen ? "written strong" : "written", title: token.p.toFixed(3), onclick: () => choose(i) }, token.text)
    : make("span", {}, token.text)));
  $("xray").hidden = story.length === 0;
  $("xray").href = `/xray?tokens=${story.slice(0, 128).map((token) => token.id).join()}&prompt=${Math.max(1, given)}`;
}
function choose(i) {
  chosen = i;
  const { top, id } = story[i];
  $("choices").replaceChildren(make("table", {}, make("tbody", {}, ...top.map((one) => make("tr", {},
    make("td", {}, make("button", { type: "button", className: one.id === id ? "strong" : "link", onclick: () => instead(i, one) }, one.text.replaceAll(" ", "␣").replaceAll("\n", "⏎"))),
    make("td", { className: "bars" }, Object.assign(make("i", {}), { style: `width: ${100 * one.p}%` })), make("td", { className: "n" }, one.p.toFixed(3)))))));
  show();
}
function instead(i, one) {
  story = [...story.slice(0, i), { ...story[i], id: one.id, text: one.text, p: one.p }];
  write();
}
// Goes on from the tokens of the story.
async function write() {
  if (reader) reader.abort();
  const mine = (reader = new AbortController());
  chosen = -1;
  $("choices").replaceChildren();
  $("message").textContent = "";
  $("stop").disabled = false;
  const settings = Object.fromEntries(["temperature", "top_p", "max_tokens"].map((name) => [name, Number($(name).value)]));
  if (settings.top_p >= 1 || !settings.temperature) delete settings.top_p;
  try {
    const answer = await ask("/v1/completions", { ...settings, prompt: story.map((token) => token.id), stream: true, logprobs: 10 }, mine.signal);
    const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await lines.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event !== "data: [DONE]") take(JSON.parse(event.slice(6)).choices[0]);
      show();
    }
  } catch (error) {
    if (error.name !== "AbortError") $("message").textContent = error.message;
  }
  if (reader === mine) { reader = null; $("stop").disabled = true; show(); }
}
function take({ logprobs, finish_reason }) {
  logprobs.token_ids.forEach((id, i) => {
    const top = Object.entries(logprobs.top_logprobs[i]).map(([text, logprob], j) => ({ id: logprobs.top_ids[i][j], text, p: Math.exp(logprob) }));
    story.push({ id, text: logprobs.tokens[i], p: Math.exp(logprobs.token_logprobs[i]), top });
  });
  if (finish_reason) $("message").textContent = finish_reason === "stop" ? "The model ended its text." : "";
}
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const { tokens, texts } = await (await ask("/tokenize", { prompt: $("text").value })).json();
    story = tokens.map((id, i) => ({ id, text: texts[i] }));
    if (data.start !== null) story.unshift({ id: data.start, text: "" });
    if (!story.length) throw new Error("Write a beginning first.");
    given = story.length;
    write();
  } catch (error) {
    $("message").textContent = error.message;
  }
});
$("stop").addEventListener("click", () => reader && reader.abort());
