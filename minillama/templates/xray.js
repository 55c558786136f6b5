"use strict";
// The X-ray page: `data` holds the numbers (minillama/cli/xray_page.py), `state` what is chosen, `draw` shows it.
// Everything that a model or a user wrote reaches the page as textContent, never as HTML.

const $ = (id) => document.getElementById(id);
const unpacked = (name, value) => (value && value.kind && value.data ? unpack(value) : value);
const data = JSON.parse($("data").textContent, unpacked);
const { L, H, K, M, T, hd } = data.sizes, { maps, tokens, other } = data;
const range = (n) => [...Array(n).keys()];
const near0 = (x, digits) => (Math.abs(x) < 0.5 * 10 ** -digits ? 0 : x); // no "-0.00"
const fixed = (x, digits = 3) => (Number.isFinite(x) ? near0(x, digits).toFixed(digits).replace("-", "−") : "–");
const best = (n, value) => range(n).sort((a, b) => value(b) - value(a));

function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  if (packed.kind === "f4") return new Float32Array(bytes.buffer);
  return Float32Array.from(new Int16Array(bytes.buffer), (x) => x * packed.scale);
}
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "line", "circle", "path", "text", "polyline", "g", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [rule, to] of Object.entries(value)) node.style.setProperty(rule, to);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
// A table that scrolls. A row has a head, cells (texts of numbers, or td elements) and may have a class.
function table(head, rows, caption) {
  const line = (row) => make("tr", { class: row.class || "" }, make("th", { scope: "row" }, row.head),
    ...row.cells.map((cell) => (typeof cell === "string" ? make("td", { class: "n" }, cell) : cell)));
  const heads = head.map((name, i) => make("th", { class: i ? "n" : "" }, name));
  return make("div", { class: "scroll" }, make("table", {}, caption ? make("caption", {}, caption) : null,
    make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows.map(line))));
}
const fill = (id, ...children) => $(id).replaceChildren(...children.filter((child) => child !== null));
const quote = (text) => `“${text.replace(/^␣(?=.)/, "")}”`;
// A token of the text, with its number if the text has it twice.
const quoted = (t) => quote(tokens[t]) + (tokens.indexOf(tokens[t]) === tokens.lastIndexOf(tokens[t]) ? "" : ` (${t + 1})`);
const mapName = (l, h) => `layer ${l + 1}, ${data.mapNames[h]}`;

// What is chosen

const state = { t: Math.max(0, data.prompt - 1), s: null, layer: 0, head: 0, view: "with", lead: false };
const settings = { ...data.settings };

function choose(change) {
  Object.assign(state, change);
  const inside = document.activeElement.closest("#tokens, #grid"); // what has the focus is drawn anew
  draw();
  if (inside) inside.querySelector("[aria-pressed=true]").focus();
}
// The token that is read: the chosen one if it can be read, else the one that is read most, apart from the token itself.
function read() {
  if (state.s !== null && visible(state.t, state.s)) return state.s;
  const [first] = best(T, (s) => (s === state.t || !visible(state.t, s) ? -1 : here(s)));
  return visible(state.t, first) ? first : state.t;
}
const visible = (t, s) => !data.causal || (s <= t && (data.window === null || s > t - data.window));
function weightIn(values, l, h, t, s) {
  if (data.causal) return s > t ? 0 : values[((l * H + h) * T * (T + 1)) / 2 + (t * (t + 1)) / 2 + s];
  return values[((l * H + h) * T + t) * T + s];
}
function weight(l, h, t, s) {
  if (state.view === "without") return weightIn(data.mapsWithout, l, h, t, s);
  if (state.view === "other") return weightIn(other.maps, l, h, t, s);
  const own = weightIn(maps, l, h, t, s);
  return state.view === "difference" ? own - weightIn(other.maps, l, h, t, s) : own;
}
const here = (s) => weight(state.layer, state.head, state.t, s);
const chosenMap = () => mapName(state.layer, state.head);
// Parts 2 and 6 have the queries and keys of this model.
const ofThis = () => chosenMap() + { with: "", without: ", without positions" }[state.view] || `${chosenMap()} of this model`;

// The tokens

function drawTokens() {
  const reads = (s) => (visible(state.t, s) ? Math.abs(here(s)) : 0);
  fill("tokens", ...range(T).map((t) => make("button", {
    type: "button", "aria-pressed": t === state.t, tabindex: t === state.t ? 0 : -1, class: t < data.prompt ? "given" : "written",
    title: `token ${t + 1}, id ${data.ids[t]}`, style: { "--share": Math.sqrt(reads(t)) }, onclick: () => choose({ t }),
  }, tokens[t])));
  const place = data.lens.rank[L][state.t], answer = quote(data.answers[state.t]), p = fixed(data.lens.answer[L * T + state.t]);
  const rank = place > 1 ? `, number ${place}` : state.t + 1 < T ? ", the likeliest" : "";
  const next = data.kind === "classes" ? `at this token the classifier's answer, ${answer}, has ${p}${rank}` :
    `${state.t + 1 < T ? "the next token is" : "the likeliest next token is"} ${answer} (${p}${rank})`;
  fill("chosen", `Chosen: ${quoted(state.t)}, token ${state.t + 1} of ${T}; ${next}.`);
}
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -T, End: T }[event.key];
  if (step === undefined || event.target.closest("input, select, #grid") || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  choose({ t: Math.min(T - 1, Math.max(0, state.t + step)) });
});

// 1. Attention

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map(Number);
function paint(canvas, l, h, [plus, minus]) {
  canvas.width = canvas.height = T;
  const context = canvas.getContext("2d");
  const image = context.createImageData(T, T);
  for (let t = 0; t < T; t++) for (let s = 0; s < T; s++) {
    const value = weight(l, h, t, s);
    image.data.set([...(value < 0 ? minus : plus), 255 * Math.sqrt(Math.min(1, Math.abs(value)))], 4 * (t * T + s));
  }
  context.putImageData(image, 0, 0);
}
function drawGrid() {
  const two = [colour("--plus"), colour("--minus")], heads = range(H).map((h) => make("span", { class: "quiet" }, data.mapNames[h].replace("head ", "")));
  fill("grid", make("div", { role: "row", class: "heads" }, make("span", {}, ""), ...heads), ...range(L).map((l) => make("div", { role: "row" }, make("span", { class: "quiet" }, `${l + 1}`),
    ...range(H).map((h) => {
      const canvas = make("canvas");
      paint(canvas, l, h, two);
      const chosen = l === state.layer && h === state.head;
      return make("button", { type: "button", role: "gridcell", "aria-pressed": chosen, tabindex: chosen ? 0 : -1,
        "aria-label": mapName(l, h), title: mapName(l, h), onclick: () => choose({ layer: l, head: h }) }, canvas);
    }))));
  paint($("map"), state.layer, state.head, two);
  for (const [id, at, size, i] of [["row", "top", "height", state.t], ["column", "left", "width", read()]]) {
    $(id).style[at] = `${(100 * i) / T}%`;
    $(id).style[size] = `${100 / T}%`;
  }
}
$("grid").addEventListener("keydown", (event) => {
  const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] || [];
  if (down === undefined) return;
  event.preventDefault();
  choose({ layer: (state.layer + down + L) % L, head: (state.head + right + H) % H });
});
function cellOf(event) {
  const box = $("map").getBoundingClientRect();
  const place = (at, start, size) => Math.min(T - 1, Math.max(0, Math.floor(((at - start) / size) * T)));
  return { t: place(event.clientY, box.top, box.height), s: place(event.clientX, box.left, box.width) };
}
$("map").addEventListener("click", (event) => {
  const { t, s } = cellOf(event);
  if (visible(t, s)) choose({ t, s });
});
$("map").addEventListener("mousemove", (event) => {
  const { t, s } = cellOf(event);
  const said = visible(t, s) ? reading(s, weight(state.layer, state.head, t, s)) : `cannot read ${quoted(s)}, which comes later`;
  fill("cell", `${quoted(t)} ${said}`);
});
// What is read of token s, in words.
function reading(s, value) {
  if (state.view !== "difference") return `reads ${quoted(s)} ${fixed(value)}`;
  return `reads ${quoted(s)} ${fixed(Math.abs(value))} ${value < 0 ? "less" : "more"}`;
}
function drawLines() {
  const step = 20, width = 340, middle = [120, 220], s = read();
  const nodes = range(T).flatMap((i) => [0, 1].map((side) => make("text", {
    x: middle[side] + (side ? 6 : -6), y: step * (i + 0.7), "text-anchor": side ? "start" : "end",
    class: (side ? i === s : i === state.t) ? "strong" : side && !visible(state.t, i) ? "hidden" : "",
    onclick: () => choose(side ? { s: i } : { t: i }),
  }, tokens[i].slice(0, 14))));
  const lines = range(T).filter((i) => visible(state.t, i)).map((i) => {
    const value = here(i), size = Math.abs(value), style = { opacity: Math.sqrt(size), "stroke-width": 0.5 + 5 * size };
    return make("line", { x1: middle[0], y1: step * (state.t + 0.5), x2: middle[1], y2: step * (i + 0.5),
      class: value < 0 ? "minus" : "plus", style });
  });
  fill("lines", make("svg", { viewBox: `0 0 ${width} ${step * T}`, width, height: step * T, role: "img",
    "aria-label": `what ${tokens[state.t]} reads` }, ...lines, ...nodes));
  $("lines").scrollTop = step * state.t - $("lines").clientHeight / 2;
  const order = best(T, (i) => (visible(state.t, i) ? Math.abs(here(i)) : -1)).slice(0, 5).filter((i) => visible(state.t, i));
  fill("reads", `In ${chosenMap()}, ${quoted(state.t)} ${order.map((i) => reading(i, here(i))).join(", ").replaceAll(", reads", ",")}.`);
  const of = (i) => weight(Math.floor(i / H), i % H, state.t, s), changed = state.view === "difference";
  fill("readers", `Maps in which ${quoted(state.t)} reads ${quoted(s)} ${changed ? "most differently" : "most"}: `,
    ...best(L * H, (i) => Math.abs(of(i))).slice(0, 5).flatMap((i, n) => [n ? ", " : "", mapLink(Math.floor(i / H), i % H), ` (${fixed(of(i))})`]), ".");
}
const mapLink = (l, h) => make("button", { type: "button", class: "link", onclick: () => choose({ layer: l, head: h, s: read() }) },
  mapName(l, h));

// 2. Positions

const row = (values, n, width) => values.subarray(n * width, (n + 1) * width); // the n-th row of a table
// A query or key at its position: each pair of features is turned by position times frequency.
function placed(plain, position) {
  if (data.frequencies === null || state.view === "without") return plain;
  return Float64Array.from(plain, (x, i) => {
    const angle = position * data.frequencies[i >> 1], pair = plain[i ^ 1];
    return x * Math.cos(angle) + (i % 2 ? pair : -pair) * Math.sin(angle);
  });
}
const placedKey = (s) => placed(row(data.key, (state.layer * K + Math.floor((state.head * K) / H)) * T + s, hd), s);
const placedQuery = (t) => placed(row(data.query, (state.layer * H + state.head) * T + t, hd), t);
function drawPositions() {
  const s = read(), query = placedQuery(state.t), key = placedKey(s);
  const length = (x, i) => Math.hypot(x[2 * i], x[2 * i + 1]);
  const longest = [query, key].map((x) => Math.max(...range(hd / 2).map((i) => length(x, i)), 1e-9));
  const hand = (x, i, which) => make("line", { x1: 20, y1: 20, class: ["plus", "minus"][which],
    x2: 20 + (18 * x[2 * i]) / longest[which], y2: 20 - (18 * x[2 * i + 1]) / longest[which] });
  if (data.frequencies === null) fill("clocks", "This model has no rotary positions: ALiBi makes distant scores smaller.");
  else fill("clocks", ...range(hd / 2).map((i) => {
    const product = (query[2 * i] * key[2 * i] + query[2 * i + 1] * key[2 * i + 1]) / Math.sqrt(hd);
    const turn = (2 * Math.PI) / data.frequencies[i];
    return make("figure", { title: `pair ${i + 1}: one turn in ${turn.toFixed(1)} tokens; adds ${fixed(product)} to the score` },
      make("svg", { viewBox: "0 0 40 40" }, make("circle", { cx: 20, cy: 20, r: 19 }), hand(query, i, 0), hand(key, i, 1)),
      make("figcaption", { class: product < 0 ? "minus" : "plus" }, fixed(product, 2)));
  }));
  const apart = Math.abs(state.t - s);
  fill("pair", `The query of ${quoted(state.t)} (blue) and the key of ${quoted(s)} (orange), ${apart} token${apart === 1 ? "" : "s"} apart, in ${ofThis()}.`);
  const means = row(data.distance, state.layer * H + state.head, T);
  const line = range(T).map((d) => [d, means[d]]).filter(([, y]) => Number.isFinite(y));
  const low = Math.min(...line.map(([, y]) => y)), high = Math.max(...line.map(([, y]) => y), low + 1e-6);
  const at = ([d, y]) => [40 + (310 * d) / Math.max(1, T - 1), 110 - (100 * (y - low)) / (high - low)];
  fill("distance", make("svg", { viewBox: "0 0 360 140", role: "img", "aria-label": "mean score by distance" },
    make("polyline", { points: line.map((point) => at(point).join(",")).join(" ") }),
    ...[low, high].map((y) => make("text", { x: 36, y: at([0, y])[1] + 4, "text-anchor": "end" }, fixed(y, 1))),
    ...[0, T - 1].map((d) => make("text", { x: at([d, 0])[0], y: 126, "text-anchor": "middle" }, `${d}`)),
    make("text", { x: 195, y: 138, "text-anchor": "middle" }, "distance in tokens")));
}

// 3. Logit lens

function lensTable(lens, caption) {
  const { t } = state, n = lens.texts[0][0].length, answer = data.answers[t];
  const rows = range(L + 1).reverse().map((i) => ({
    head: i === 0 ? "embedding" : `layer ${i}`,
    class: caption === "" && i === data.first[t] ? "marked" : "",
    cells: [
      ...lens.texts[i][t].map((name, j) => {
        const p = lens.p[(i * T + t) * n + j], small = make("small", {}, ` ${fixed(p, 2)}`);
        return make("td", { style: { "--share": p }, class: `share ${name === answer ? "strong" : ""}` }, name, small);
      }),
      fixed(lens.answer[i * T + t]), `${lens.rank[i][t]}`,
    ],
  }));
  return table(["after", ...range(n).map((i) => `${i + 1}.`), quote(answer), "rank"], rows, caption);
}
function drawLens() {
  const { t } = state, first = data.first[t], answer = quote(data.answers[t]), { texts, p, rank } = data.lens;
  const choice = quote(texts[L][t][0]), chance = fixed(p[(L * T + t) * texts[0][0].length]), number = rank[L][t];
  fill("first", first <= L ? `${answer} is the likeliest from here on: ${first === 0 ? "the embedding" : `layer ${first}`} (marked), ` +
    `first with ${fixed(data.lens.answer[first * T + t], 2)}, at the end with ${fixed(data.lens.answer[L * T + t], 2)}.` :
    data.kind === "classes" ? `At this token ${choice} is the likeliest (${chance}); the classifier's answer, ${answer}, is number ${number}.` :
    `The text goes on with ${answer}, which is the model's number ${number}; its own choice would be ${choice} (${chance}).`);
  fill("lens", lensTable(data.lens, ""), other && lensTable(other.lens, `The other model, ${other.model}` +
    (other.answers ? `, which answers ${other.answers}` : "")));
}

// 4. Shares

function sharesTable(shares, caption) {
  const { t } = state, sum = (values) => values.reduce((a, b) => a + b, 0);
  const parts = range(L).map((l) => [shares.feedForward[l * T + t], ...range(M).map((m) => shares.heads[(l * M + m) * T + t])]);
  const largest = Math.max(...parts.flat().map(Math.abs), 1e-9);
  const cell = (x) => make("td", { class: `n share ${x < 0 ? "minus" : "plus"}`, style: { "--share": Math.abs(x) / largest } }, fixed(x, 2));
  const rows = parts.map((some, l) => ({ head: `layer ${l + 1}`, cells: [fixed(sum(some), 2), ...some.map(cell)] }));
  const line = (head, x) => ({ head, cells: [fixed(x, 2)] });
  const total = shares.embedding[t] + shares.bias[t] + sum(parts.flat());
  rows.unshift(line("embedding", shares.embedding[t]));
  if (data.hasBias) rows.push(line("bias", shares.bias[t]));
  rows.push(line(state.lead ? "difference" : "logit", total));
  const named = parts.flatMap((some, l) => some.map((x, m) => [x, `${m ? `head ${m}` : "feed-forward"} of layer ${l + 1}`]));
  named.sort(([a], [b]) => b - a);
  const said = (some) => some.map(([x, name]) => `${name} (${fixed(x, 2)})`).join(", ");
  const words = `Most for it: ${said(named.slice(0, 3))}. Most against it: ${said(named.slice(-2).reverse())}.`;
  const heads = ["", "sum", "feed-forward", ...range(M).map((m) => `head ${m + 1}`)];
  return make("div", {}, table(heads, rows, caption), make("p", {}, words));
}
function drawShares() {
  const which = state.lead ? "lead" : "answer", answer = quote(data.answers[state.t]);
  fill("what", state.lead ? `the logit of ${answer} minus that of ${quote(data.rivals[state.t])}` : `the logit of ${answer}`);
  const second = other && sharesTable(other.shares[which], `The other model, ${other.model}`);
  fill("shares", sharesTable(data.shares[which], ""), second);
}

// 5. Candidates

function probabilities(kept) {
  const top = Math.max(...kept.map((one) => one.z));
  const sum = kept.reduce((total, one) => total + one.n * Math.exp(one.z - top), 0);
  return kept.map((one) => Math.exp(one.z - top) / sum); // of one token; an entry stands for n of them
}
const entropyOf = (kept, p) => kept.reduce((total, one, i) => total - (p[i] > 0 ? one.n * p[i] * Math.log(p[i]) : 0), 0);
// The fewest entries, in their order, that reach the total: the index of the last one.
function reached(entries, total, sum = 0) {
  return Math.max(0, entries.findIndex(([p, n]) => (sum += p * n) >= total - 1e-9));
}
const filters = {
  epsilon: (kept, p, x) => kept.filter((_, i) => p[i] >= x),
  eta: (kept, p, x) => kept.filter((_, i) => p[i] >= Math.min(x, Math.sqrt(x) * Math.exp(-entropyOf(kept, p)))),
  top_k: (kept, p, x) => kept.filter((one) => one.z >= kept[Math.min(x, kept.length) - 1].z),
  top_p: (kept, p, x) => kept.filter((_, i) => p[i] >= p[reached(kept.map((one, j) => [p[j], one.n]), x)]),
  min_p: (kept, p, x) => kept.filter((one) => one.z >= kept[0].z + Math.log(x)),
  typical_p: (kept, p, x) => {
    const h = entropyOf(kept, p), far = p.map((q) => Math.abs(-Math.log(q) - h));
    const order = best(kept.length, (i) => -far[i]);
    const last = far[order[reached(order.map((i) => [p[i], kept[i].n]), x)]];
    return kept.filter((_, i) => far[i] <= last);
  },
};
// All candidates at a position with their probabilities before and after temperature and filters, likeliest first.
function candidates(t, chosen) {
  const count = data.logits.length / T;
  const id = (i) => (data.ranked === null ? i : data.ranked[t * count + i]);
  const all = range(count).map((i) => ({ id: id(i), z: data.logits[t * count + i], n: 1 }));
  if (data.rest) all.push({ id: -1, z: data.restLogits[t], n: data.rest });
  all.sort((a, b) => b.z - a.z);
  probabilities(all).forEach((p, i) => (all[i].before = p));
  let kept = all.map((one) => ({ ...one, z: one.z / (chosen.temperature || 1) }));
  if (chosen.temperature === 0) kept = kept.slice(0, 1);
  else for (const [name, filter] of Object.entries(filters)) {
    if (!chosen[name]) continue;
    const left = filter(kept, probabilities(kept), chosen[name]);
    kept = left.length ? left : kept.slice(0, 1);
  }
  const after = new Map(probabilities(kept).map((p, i) => [kept[i].id, p]));
  for (const one of all) one.after = after.get(one.id) || 0;
  return all;
}
function random(seed) { // numbers in (0, 1), by Park and Miller's "minimal standard" generator (1988)
  let x = 1 + ((seed * 69621) % 2147483646);
  return () => (x = (x * 48271) % 2147483647) / 2147483647;
}
const nameOf = (id) => (id < 0 ? `one of ${data.rest} rarer tokens` : data.vocabulary[id]);
function drawCandidates() {
  const classes = data.kind === "classes", columns = classes ? ["before"] : ["before", "after"]; // of classes nothing is cut
  const all = candidates(state.t, settings);
  const kept = all.filter((one) => one.after > 0), cut = all.filter((one) => one.after === 0);
  const size = (some) => some.reduce((total, one) => total + one.n, 0);
  const mass = cut.reduce((total, one) => total + one.n * one.before, 0);
  const bars = (one) => make("td", { class: "bars" },
    ...(classes ? [["b", one.before]] : [["i", one.before], ["b", one.after]]).map(([tag, p]) => make(tag, { style: { width: `${100 * p}%` } })));
  const line = (one) => ({ head: nameOf(one.id), class: one.after ? "" : "cut",
    cells: [bars(one), ...columns.map((when) => (when === "after" && !one.after ? "cut" : fixed(one[when])))] });
  const rest = (some, word) => (some.length ? [{ head: `${size(some)} more ${classes ? "classes" : word}`, class: "cut", cells: [make("td"),
    ...columns.map((when) => fixed(some.reduce((total, one) => total + one.n * one[when], 0)))] }] : []);
  const rows = [...kept.slice(0, 12).map(line), ...rest(kept.slice(12), "kept"), ...cut.slice(0, 6).map(line), ...rest(cut.slice(6), "cut")];
  fill("candidates", table(classes ? ["class", "", "probability"] : ["token", "", ...columns], rows, ""));
  if (classes) return;
  fill("counts", `Kept ${size(kept)}, cut ${size(cut)} with ${fixed(mass)} of the probability.`);
  const next = random(Number($("seed").value) || 0), drawn = new Map();
  for (let i = 0; i < 20; i++) {
    let share = next();
    const one = kept.find((candidate) => (share -= candidate.after * candidate.n) < 0) || kept[kept.length - 1];
    drawn.set(nameOf(one.id), (drawn.get(nameOf(one.id)) || 0) + 1);
  }
  fill("draws", `20 draws: ${[...drawn].sort((a, b) => b[1] - a[1]).map(([name, n]) => `${name} ${n}`).join(", ")}.`);
}
function connectSliders() {
  for (const input of document.querySelectorAll("#sliders input[type=range]")) {
    const name = input.id, small = ["epsilon", "eta"].includes(name); // cubed, so that small values can be chosen
    const total = ["top_p", "typical_p"].includes(name), off = name === "temperature" ? "0" : "off"; // a total of 1 is off
    const show = () => (input.nextElementSibling.textContent = settings[name] ? Number(settings[name].toPrecision(3)) : off);
    const start = settings[name] || (total ? 1 : 0);
    input.value = small ? Math.cbrt(start) : start;
    input.addEventListener("input", () => {
      const value = small ? Number((Number(input.value) ** 3).toPrecision(2)) : Number(input.value);
      settings[name] = total && value >= 1 ? 0 : value;
      show();
      drawCandidates();
    });
    show();
  }
  if ($("seed")) $("seed").addEventListener("input", drawCandidates);
}

// 6. One cell in numbers

function drawArithmetic() {
  const { t, head } = state, s = read(), query = placedQuery(t), key = placedKey(s);
  const turned = data.frequencies === null ? "" : `, ${state.view === "without" ? "not " : ""}turned by their positions`;
  const dot = (other) => range(hd).reduce((sum, i) => sum + query[i] * other[i], 0);
  const slope = data.slopes && state.view !== "without" ? data.slopes[head] : 0;
  const seen = range(T).filter((i) => visible(t, i));
  const scores = new Map(seen.map((i) => [i, dot(placedKey(i)) / Math.sqrt(hd) - slope * Math.abs(t - i)]));
  const top = Math.max(...scores.values()), power = (i) => Math.exp(scores.get(i) - top);
  const sum = seen.reduce((total, i) => total + power(i), 0);
  const products = range(hd).map((i) => ({ head: `${i + 1}`, cells: [query[i], key[i], query[i] * key[i]].map((x) => fixed(x)) }));
  const shares = seen.map((i) => ({ head: quoted(i), class: i === s ? "marked" : "",
    cells: [fixed(scores.get(i)), fixed(power(i), 4), fixed(power(i) / sum)] }));
  shares.push({ head: "sum", cells: ["", fixed(sum, 4), "1.000"] });
  const bias = slope ? `, minus ${fixed(slope, 4)} × ${t - s} (ALiBi)` : "", bold = (x, id = "") => make("b", { id }, fixed(x));
  fill("arithmetic",
    make("p", {}, `How much does ${quoted(t)} read of ${quoted(s)} in ${ofThis()}?`),
    make("ol", {},
      make("li", {}, `Multiply the query of ${quoted(t)} and the key of ${quoted(s)}${turned}, feature by feature.`,
        make("details", {}, make("summary", {}, `all ${hd} products`),
          table(["feature", "query", "key", "product"], products, ""))),
      make("li", {}, "Add them up: ", bold(dot(key))),
      make("li", {}, `Divide by the square root of the head's width, √${hd} = ${fixed(Math.sqrt(hd))}${bias}. The score is `,
        bold(scores.get(s))),
      make("li", {}, `Softmax: e^(score − ${fixed(top)}) = ${fixed(power(s), 4)}, divided by the sum over the ${seen.length} tokens `,
        `that ${quoted(t)} can read, ${fixed(sum, 4)}: `, bold(power(s) / sum, "result"))),
    table(["token", "score", "e^(score − largest)", "share"], shares, ""));
}
const draw = () => [drawTokens, drawGrid, drawLines, drawPositions, drawLens, drawShares, drawCandidates, drawArithmetic]
  .forEach((part) => part());
$("view").addEventListener("change", (event) => choose({ view: event.target.value }));
$("lead").addEventListener("change", (event) => choose({ lead: event.target.checked }));
document.querySelectorAll("[data-choose]").forEach((one) => one.addEventListener("click", () => choose(JSON.parse(one.dataset.choose))));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
connectSliders();
// Begins with the map in which the chosen token reads one before the last most: the first token and itself say little.
const backwards = (i) => Math.max(0, ...range(Math.max(0, state.t - 1)).map((s) => (s ? weight(Math.floor(i / H), i % H, state.t, s) : 0)));
const [clearest] = best(L * H, backwards);
choose({ layer: Math.floor(clearest / H), head: clearest % H });
$("tokens").children[state.t].focus({ preventScroll: true });
