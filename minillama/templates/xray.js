"use strict";
// The X-ray page: `data` holds the numbers (minillama/cli/xray_page.py), `state` what is chosen, `draw` shows it.
// Everything that a model or a user wrote reaches the page as textContent, never as HTML.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { L, H, K, M, T, hd } = data.sizes;
const other = data.other;
const range = (n) => [...Array(n).keys()];
const fixed = (x, digits = 3) => (Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "–");
const best = (n, value) => range(n).sort((a, b) => value(b) - value(a));

function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  if (packed.kind === "f4") return new Float32Array(bytes.buffer);
  return Float32Array.from(new Int16Array(bytes.buffer), (x) => x * packed.scale);
}
function unpacked(value) {
  if (value === null || typeof value !== "object") return value;
  if (value.kind !== undefined && value.data !== undefined) return unpack(value);
  if (Array.isArray(value)) return value.map(unpacked);
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, unpacked(one)]));
}
for (const name of Object.keys(data)) data[name] = unpacked(data[name]);
const { maps, tokens } = data;
const otherMaps = data.other && data.other.maps;

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
const fill = (id, ...children) => $(id).replaceChildren(...children.filter((child) => child !== null));
const bare = (text) => text.replace(/^␣(?=.)/, "");
const quoted = (t) => `“${bare(tokens[t])}”`;
const mapName = (l, h) => `layer ${l + 1}, ${data.mapNames[h]}`;

// What is chosen

const state = { t: Math.max(0, data.prompt - 1), s: null, layer: 0, head: 0, view: "with", lead: false };
const settings = { ...data.settings };

function choose(change) {
  if ("t" in change || "layer" in change || "head" in change) if (!("s" in change)) change.s = null;
  Object.assign(state, change);
  const inside = document.activeElement.closest("#tokens, #grid"); // what has the focus is drawn anew
  draw();
  if (inside) inside.querySelector("[aria-pressed=true]").focus();
}
// The token that is read: the chosen one, else the one that is read most, apart from the token itself.
function read() {
  if (state.s !== null && visible(state.t, state.s)) return state.s;
  const [first] = best(T, (s) => (s === state.t || !visible(state.t, s) ? -1 : weight(state.layer, state.head, state.t, s)));
  return visible(state.t, first) ? first : state.t;
}
function visible(t, s) {
  return !data.causal || (s <= t && (data.window === null || s > t - data.window));
}
function weightIn(values, l, h, t, s) {
  if (data.causal) return s > t ? 0 : values[((l * H + h) * T * (T + 1)) / 2 + (t * (t + 1)) / 2 + s];
  return values[((l * H + h) * T + t) * T + s];
}
function weight(l, h, t, s) {
  if (state.view === "without") return weightIn(data.mapsWithout, l, h, t, s);
  if (state.view === "other") return weightIn(otherMaps, l, h, t, s);
  const own = weightIn(maps, l, h, t, s);
  return state.view === "difference" ? own - weightIn(otherMaps, l, h, t, s) : own;
}

// The tokens

function drawTokens() {
  const reads = (s) => (visible(state.t, s) ? Math.abs(weight(state.layer, state.head, state.t, s)) : 0);
  fill("tokens", ...range(T).map((t) => make("button", {
    type: "button", "aria-pressed": t === state.t, tabindex: t === state.t ? 0 : -1, class: t < data.prompt ? "given" : "written",
    title: `token ${t + 1}, id ${data.ids[t]}`, style: { "--share": Math.sqrt(reads(t)) }, onclick: () => choose({ t }),
  }, tokens[t])));
  const next = data.kind === "classes" ? `the class at this token is ${data.answers[state.t]}` :
    state.t + 1 < T ? `the next token is ${quoted(state.t + 1)}` : `the likeliest next token is “${bare(data.answers[state.t])}”`;
  fill("chosen", `Chosen: ${quoted(state.t)}, token ${state.t + 1} of ${T}; ${next}.`);
}
$("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -T, End: T }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  choose({ t: Math.min(T - 1, Math.max(0, state.t + step)) });
});

// 1. Attention

function colours() {
  const style = getComputedStyle(document.documentElement);
  return ["--plus", "--minus"].map((name) => style.getPropertyValue(name).split(",").map(Number));
}
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
  const two = colours();
  fill("grid", ...range(L).map((l) => make("div", { role: "row" }, make("span", { class: "quiet" }, `${l + 1}`),
    ...range(H).map((h) => {
      const canvas = make("canvas");
      paint(canvas, l, h, two);
      const chosen = l === state.layer && h === state.head;
      return make("button", { type: "button", role: "gridcell", "aria-pressed": chosen, tabindex: chosen ? 0 : -1,
        "aria-label": mapName(l, h), title: mapName(l, h), onclick: () => choose({ layer: l, head: h }) }, canvas);
    }))));
  paint($("map"), state.layer, state.head, two);
  $("row").style.top = `${(100 * state.t) / T}%`;
  $("row").style.height = `${100 / T}%`;
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
$("map").addEventListener("click", (event) => choose(cellOf(event)));
$("map").addEventListener("mousemove", (event) => {
  const { t, s } = cellOf(event);
  fill("cell", visible(t, s) ? `${quoted(t)} reads ${quoted(s)}: ${fixed(weight(state.layer, state.head, t, s))}` : `${quoted(t)} comes before ${quoted(s)} and cannot read it`);
});
function drawLines() {
  const step = 20, width = 340, middle = [120, 220], s = read();
  const nodes = range(T).flatMap((i) => [0, 1].map((side) => make("text", {
    x: middle[side] + (side ? 6 : -6), y: step * (i + 0.7), "text-anchor": side ? "start" : "end",
    class: (side ? i === s : i === state.t) ? "strong" : side && !visible(state.t, i) ? "hidden" : "",
    onclick: () => choose(side ? { s: i } : { t: i }),
  }, tokens[i].slice(0, 14))));
  const lines = range(T).filter((i) => visible(state.t, i)).map((i) => {
    const value = weight(state.layer, state.head, state.t, i);
    return make("line", { x1: middle[0], y1: step * (state.t + 0.5), x2: middle[1], y2: step * (i + 0.5),
      class: value < 0 ? "minus" : "plus", style: { opacity: Math.sqrt(Math.abs(value)), "stroke-width": 0.5 + 5 * Math.abs(value) } });
  });
  fill("lines", make("svg", { viewBox: `0 0 ${width} ${step * T}`, width, height: step * T, role: "img",
    "aria-label": `what ${tokens[state.t]} reads` }, ...lines, ...nodes));
  const box = $("lines"), centre = step * state.t - box.clientHeight / 2;
  if (centre < box.scrollTop - box.clientHeight / 2 || centre > box.scrollTop + box.clientHeight / 2) box.scrollTop = centre;
  const order = best(T, (i) => (visible(state.t, i) ? Math.abs(weight(state.layer, state.head, state.t, i)) : -1)).slice(0, 5);
  const what = order.filter((i) => visible(state.t, i)).map((i) => `${quoted(i)} ${fixed(weight(state.layer, state.head, state.t, i))}`);
  fill("reads", `In ${mapName(state.layer, state.head)}, ${quoted(state.t)} reads ${what.join(", ")}.`);
  const heads = best(L * H, (i) => weight(Math.floor(i / H), i % H, state.t, s)).slice(0, 5);
  fill("readers", `Maps in which ${quoted(state.t)} reads ${quoted(s)} most: `, ...heads.flatMap((i) => {
    const [l, h] = [Math.floor(i / H), i % H];
    return [make("button", { type: "button", class: "link", onclick: () => choose({ layer: l, head: h, s }) },
      `${mapName(l, h)}`), ` ${fixed(weight(l, h, state.t, s))}  `];
  }));
}

// 2. Positions

const vector = (values, count, l, h, t) => values.subarray((((l * count + h) * T) + t) * hd, (((l * count + h) * T) + t + 1) * hd);
// A query or key at its position: each pair of features is turned by position times frequency.
function placed(plain, position) {
  if (data.frequencies === null) return plain;
  return Float64Array.from(plain, (x, i) => {
    const angle = position * data.frequencies[i >> 1], pair = plain[i ^ 1];
    return x * Math.cos(angle) + (i % 2 ? pair : -pair) * Math.sin(angle);
  });
}
function queryAndKey() {
  const s = read(), group = H / K;
  return [placed(vector(data.query, H, state.layer, state.head, state.t), state.t),
    placed(vector(data.key, K, state.layer, Math.floor(state.head / group), s), s), s];
}
function drawPositions() {
  const [query, key, s] = queryAndKey();
  const length = (x, i) => Math.hypot(x[2 * i], x[2 * i + 1]);
  const longest = [query, key].map((x) => Math.max(...range(hd / 2).map((i) => length(x, i)), 1e-9));
  const hand = (x, i, which) => make("line", { x1: 20, y1: 20, class: ["plus", "minus"][which],
    x2: 20 + (18 * x[2 * i]) / longest[which], y2: 20 - (18 * x[2 * i + 1]) / longest[which] });
  if (data.frequencies === null) fill("clocks", "This model has no rotary positions: ALiBi subtracts a number from the score that grows with the distance.");
  else fill("clocks", ...range(hd / 2).map((i) => {
    const product = (query[2 * i] * key[2 * i] + query[2 * i + 1] * key[2 * i + 1]) / Math.sqrt(hd);
    const turn = (2 * Math.PI) / data.frequencies[i];
    return make("figure", { title: `pair ${i + 1}: one turn in ${turn.toFixed(1)} tokens; adds ${fixed(product)} to the score` },
      make("svg", { viewBox: "0 0 40 40" }, make("circle", { cx: 20, cy: 20, r: 19 }), hand(query, i, 0), hand(key, i, 1)),
      make("figcaption", { class: product < 0 ? "minus" : "plus" }, fixed(product, 2)));
  }));
  fill("pair", `The query of ${quoted(state.t)} (blue) and the key of ${quoted(s)} (orange), ${Math.abs(state.t - s)} tokens apart, in ${mapName(state.layer, state.head)}.`);
  const line = range(T).map((d) => data.distance[(state.layer * H + state.head) * T + d]).map((y, d) => [d, y]).filter(([, y]) => Number.isFinite(y));
  const low = Math.min(...line.map(([, y]) => y)), high = Math.max(...line.map(([, y]) => y), low + 1e-6);
  const at = ([d, y]) => [40 + (310 * d) / Math.max(1, T - 1), 110 - (100 * (y - low)) / (high - low)];
  fill("distance", make("svg", { viewBox: "0 0 360 140", role: "img", "aria-label": "mean score by distance" },
    make("polyline", { points: line.map((point) => at(point).join(",")).join(" ") }),
    ...[low, high].map((y) => make("text", { x: 36, y: at([0, y])[1] + 4, "text-anchor": "end" }, fixed(y, 1))),
    ...[0, T - 1].map((d) => make("text", { x: at([d, 0])[0], y: 126, "text-anchor": "middle" }, `${d}`)),
    make("text", { x: 195, y: 138, "text-anchor": "middle" }, "distance in tokens")));
}

// 3. Logit lens

const stateName = (i) => (i === 0 ? "embedding" : `layer ${i}`);
function lensTable(lens, title) {
  const n = lens.texts[0][0].length;
  const rows = range(L + 1).reverse().map((i) => {
    const cells = lens.texts[i][state.t].map((name, j) => {
      const p = lens.p[(i * T + state.t) * n + j];
      return make("td", { style: { "--share": p }, class: name === data.answers[state.t] ? "share strong" : "share" }, name, make("small", {}, ` ${fixed(p, 2)}`));
    });
    return make("tr", { class: i === data.first[state.t] && title === null ? "marked" : "" }, make("th", { scope: "row" }, stateName(i)), ...cells,
      make("td", { class: "n" }, fixed(lens.answer[i * T + state.t])), make("td", { class: "n" }, `${lens.rank[i][state.t]}`));
  });
  const head = ["after", ...range(n).map((i) => `${i + 1}.`), `“${bare(data.answers[state.t])}”`, "rank"];
  return make("div", { class: "scroll" }, make("table", {}, title && make("caption", {}, title),
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", {}, name)))), make("tbody", {}, ...rows)));
}
function drawLens() {
  const first = data.first[state.t];
  fill("first", first > L ? `“${bare(data.answers[state.t])}” is not the likeliest, even after the last layer.` :
    `“${bare(data.answers[state.t])}” is the likeliest from here on: ${first === 0 ? "the embedding" : `layer ${first}`} (marked).`);
  fill("lens", lensTable(data.lens, null), other && lensTable(data.other.lens, `The other model, ${other.model}`));
}

// 4. Shares

function sharesTable(shares, title) {
  const value = (l, m) => shares.heads[(l * M + m) * T + state.t];
  const forward = (l) => shares.feedForward[l * T + state.t];
  const top = Math.max(...range(L).flatMap((l) => [...range(M).map((m) => Math.abs(value(l, m))), Math.abs(forward(l))]), 1e-9);
  const cell = (x) => make("td", { class: `n share ${x < 0 ? "minus" : "plus"}`, style: { "--share": Math.abs(x) / top } }, fixed(x, 2));
  const rows = range(L).map((l) => {
    const parts = [...range(M).map((m) => value(l, m)), forward(l)];
    return make("tr", {}, make("th", { scope: "row" }, `layer ${l + 1}`), ...parts.map(cell), make("td", { class: "n" }, fixed(parts.reduce((a, b) => a + b), 2)));
  });
  const embedding = shares.embedding[state.t], bias = shares.bias[state.t];
  const sum = embedding + bias + range(L).reduce((a, l) => a + forward(l) + range(M).reduce((b, m) => b + value(l, m), 0), 0);
  const line = (name, x) => make("tr", {}, make("th", { scope: "row", colspan: M + 2 }, name), make("td", { class: "n" }, fixed(x, 2)));
  const head = ["", ...range(M).map((m) => `head ${m + 1}`), "feed-forward", "sum"];
  return make("div", { class: "scroll" }, make("table", {}, title && make("caption", {}, title),
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", {}, name)))),
    make("tbody", {}, line("embedding", embedding), ...rows, data.hasBias ? line("bias", bias) : null, line(data.shareNames[state.lead ? 1 : 0], sum))));
}
function drawShares() {
  const which = state.lead ? "lead" : "answer";
  fill("what", state.lead ? `by how much “${bare(data.answers[state.t])}” leads over “${bare(data.rivals[state.t])}”` : `the logit of “${bare(data.answers[state.t])}”`);
  fill("shares", sharesTable(data.shares[which], null), other && sharesTable(data.other.shares[which], `The other model, ${other.model}`));
}

// 5. Candidates

function probabilities(kept) {
  const top = Math.max(...kept.map((one) => one.z));
  const sum = kept.reduce((total, one) => total + one.n * Math.exp(one.z - top), 0);
  return kept.map((one) => Math.exp(one.z - top) / sum); // of one token; an entry stands for n of them
}
const entropyOf = (kept, p) => kept.reduce((total, one, i) => total - (p[i] > 0 ? one.n * p[i] * Math.log(p[i]) : 0), 0);
// The fewest entries, in their order, that reach the total: the index of the last one.
function reached(entries, total) {
  let sum = 0;
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
  const all = range(count).map((i) => ({ id: data.ranked === null ? i : data.ranked[t * count + i], z: data.logits[t * count + i], n: 1 }));
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
function random(seed) { // mulberry32, a small generator: numbers in [0, 1)
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
}
const nameOf = (id) => (id < 0 ? `one of ${data.rest} rarer tokens` : data.vocabulary[id]);
function drawCandidates() {
  const all = candidates(state.t, settings);
  const kept = all.filter((one) => one.after > 0), cut = all.filter((one) => one.after === 0);
  const size = (some) => some.reduce((total, one) => total + one.n, 0);
  const mass = cut.reduce((total, one) => total + one.n * one.before, 0);
  const bar = (one) => make("tr", { class: one.after ? "" : "cut" }, make("td", {}, nameOf(one.id)),
    make("td", { class: "bars" }, make("i", { style: { width: `${100 * one.before}%` } }), make("b", { style: { width: `${100 * one.after}%` } })),
    make("td", { class: "n" }, fixed(one.before)), make("td", { class: "n" }, one.after ? fixed(one.after) : "cut"));
  const head = make("thead", {}, make("tr", {}, ...["token", "", "before", "after"].map((name) => make("th", {}, name))));
  fill("candidates", make("table", {}, head, make("tbody", {}, ...kept.slice(0, 12).map(bar), ...cut.slice(0, 6).map(bar))));
  fill("counts", `Kept ${size(kept).toLocaleString("en")}, cut ${size(cut).toLocaleString("en")} with ${fixed(mass)} of the probability.`);
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
    const show = () => (input.nextElementSibling.textContent = settings[name] ? Number(settings[name].toPrecision(3)) : name === "temperature" ? "0" : "off");
    input.value = small ? Math.cbrt(settings[name] || 0) : settings[name] || 0;
    input.addEventListener("input", () => {
      settings[name] = small ? Number((Number(input.value) ** 3).toPrecision(2)) : Number(input.value);
      show();
      drawCandidates();
    });
    show();
  }
  $("seed").addEventListener("input", drawCandidates);
}

// 6. One cell in numbers

function drawArithmetic() {
  const [query, key, s] = queryAndKey();
  const dot = range(hd).reduce((sum, i) => sum + query[i] * key[i], 0);
  const scoreOf = (i) => {
    const k = placed(vector(data.key, K, state.layer, Math.floor((state.head * K) / H), i), i);
    return range(hd).reduce((sum, j) => sum + query[j] * k[j], 0) / Math.sqrt(hd) - (data.slopes ? data.slopes[state.head] * Math.abs(state.t - i) : 0);
  };
  const seen = range(T).filter((i) => visible(state.t, i)), scores = new Map(seen.map((i) => [i, scoreOf(i)]));
  const top = Math.max(...scores.values()), sum = seen.reduce((total, i) => total + Math.exp(scores.get(i) - top), 0);
  const row = (i) => make("tr", {}, ...[`${i}`, fixed(query[i]), fixed(key[i]), fixed(query[i] * key[i])].map((x) => make("td", { class: "n" }, x)));
  const head = (...names) => make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { class: "n" }, name))));
  const bias = data.slopes ? ` − ${fixed(data.slopes[state.head], 4)} × ${state.t - s} (ALiBi)` : "";
  const shown = [...new Set([s, ...best(T, (i) => (scores.has(i) ? scores.get(i) : -Infinity)).filter((i) => scores.has(i)).slice(0, 11)])].sort((a, b) => a - b);
  fill("arithmetic",
    make("p", {}, `How much does ${quoted(state.t)} read of ${quoted(s)} in ${mapName(state.layer, state.head)}?`),
    make("ol", {},
      make("li", {}, `Multiply the query of ${quoted(state.t)} and the key of ${quoted(s)}, both with their positions, feature by feature.`,
        make("details", {}, make("summary", {}, `all ${hd} products`), make("div", { class: "scroll" }, make("table", {}, head("feature", "query", "key", "product"), make("tbody", {}, ...range(hd).map(row)))))),
      make("li", {}, `Add them up: `, make("b", {}, fixed(dot))),
      make("li", {}, `Divide by the square root of the head's width, √${hd} = ${fixed(Math.sqrt(hd))}${bias}: the score is `, make("b", {}, fixed(scores.get(s)))),
      make("li", {}, `Softmax: e^(score − ${fixed(top)}) = ${fixed(Math.exp(scores.get(s) - top), 4)}, divided by the sum over all ${seen.length} tokens that it can read, ${fixed(sum, 4)}: `, make("b", { id: "result" }, fixed(Math.exp(scores.get(s) - top) / sum)))),
    make("div", { class: "scroll" }, make("table", {}, head("token", "score", "e^(score − largest)", "share"), make("tbody", {}, ...shown.map((i) =>
      make("tr", { class: i === s ? "marked" : "" }, make("td", { class: "n" }, tokens[i]), ...[fixed(scores.get(i)), fixed(Math.exp(scores.get(i) - top), 4), fixed(Math.exp(scores.get(i) - top) / sum)].map((x) => make("td", { class: "n" }, x))))))));
}

function draw() {
  drawTokens();
  drawGrid();
  drawLines();
  drawPositions();
  drawLens();
  drawShares();
  drawCandidates();
  drawArithmetic();
}
$("view").addEventListener("change", (event) => choose({ view: event.target.value, s: state.s }));
$("lead").addEventListener("change", (event) => choose({ lead: event.target.checked, s: state.s }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
connectSliders();
draw();
